"""Where weights come from: a folder, a hub, a preset or a model in memory, as a config and lazy tensors."""

import dataclasses
from pathlib import Path

from keras_t5gemma import presets
from keras_t5gemma.checkpoints.checks import check_depth, check_source, check_tensors
from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config, read_gemma2_config, read_t5gemma_config
from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder, read_json
from keras_t5gemma.checkpoints.keras_formats.layouts import GEMMA2, KERAS_HUB_T5GEMMA, OWN
from keras_t5gemma.checkpoints.keras_formats.presets import KerasPreset
from keras_t5gemma.checkpoints.orbax.files import is_orbax
from keras_t5gemma.checkpoints.orbax.parameters import read_orbax_t5gemma
from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.suggestions import did_you_mean


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that has been found and whose tensors are those of its config; no tensor is read yet.

    Attributes:
        config: what it is.
        tensors: its tensors, under Hugging Face's names and in Hugging Face's layout, whatever they come from.
    """

    config: T5GemmaConfig | Gemma2Config
    tensors: TensorSource


def t5gemma_source(origin):
    """A T5Gemma, found and checked.

    Args:
        origin: what `presets.locate` takes, in Hugging Face's format, as a Keras preset of this package or of
            keras-hub's own T5Gemma, or as Flax's Orbax checkpoint; or a `keras_hub.models.T5GemmaBackbone` or
            `T5GemmaSeq2SeqLM`.

    Returns:
        A `Source` with a `T5GemmaConfig`.

    Raises:
        ValueError: where there is no such preset.
        ConnectionError: where a download failed.
        CheckpointError: where it is another architecture, damaged or incomplete.
    """
    if not isinstance(origin, (str, Path)):
        from keras_t5gemma.checkpoints.keras_formats.models import read_t5gemma

        source = Source(*read_t5gemma(origin))
    else:
        folder = locate_t5gemma(origin)
        if not (folder / "config.json").is_file():
            source = Source(*read_orbax_t5gemma(folder))
        elif not _is_hugging_face(folder):
            tensors = KerasPreset(folder, (KERAS_HUB_T5GEMMA, OWN))
            source = Source(tensors.config, tensors)
        else:
            tensors = CheckpointFolder(folder)
            source = Source(read_t5gemma_config(tensors.config, str(folder / "config.json")), tensors)
    check_source(source.config, source.tensors)
    return source


def gemma2_source(origin):
    """A decoder-only Gemma 2 to adapt from, found and checked.

    Args:
        origin: a folder in Hugging Face's or Keras's format, "hf://owner/name", "kaggle://...", the name of one of
            keras-hub's presets such as "gemma2_2b_en"; or a `keras_hub.models.GemmaBackbone` or `GemmaCausalLM`.

    Returns:
        A `Source` with a `Gemma2Config`.

    Raises:
        ValueError: where there is no such preset.
        ConnectionError: where a download failed.
        CheckpointError: where it is another architecture (Gemma 1 and 3 included), damaged or incomplete.
    """
    if not isinstance(origin, (str, Path)):
        from keras_t5gemma.checkpoints.keras_formats.models import read_gemma2

        source = Source(*read_gemma2(origin))
    else:
        folder = locate_gemma2(origin)
        if _is_hugging_face(folder):
            tensors = CheckpointFolder(folder)
            source = Source(read_gemma2_config(tensors.config, str(folder / "config.json")), tensors)
        else:
            tensors = KerasPreset(folder, (GEMMA2,))
            source = Source(tensors.config, tensors)
    check_depth(source.tensors, "Gemma 2", source.config.stack)
    shapes = {tensor.gemma2: tensor.stored_shape for tensor in source.config.tensors()}
    check_tensors(source.tensors, shapes, "Gemma 2")
    return source


def locate_t5gemma(origin):
    """The folder of a T5Gemma: as `presets.locate`, and Flax's checkpoints, which have no `config.json`.

    Raises:
        ValueError, ConnectionError: as `presets.locate`.
        CheckpointError: where the folder holds neither.
    """
    folder = presets.locate(origin, config=False)
    has_config = (folder / "config.json").is_file()
    return folder if not has_config and is_orbax(folder) else _with_config(folder)


def locate_gemma2(origin):
    """The folder of a Gemma 2: as `presets.locate`, and the names of keras-hub's presets.

    Raises:
        ValueError, ConnectionError: as `presets.locate`.
        CheckpointError: where the folder has no `config.json`.
    """
    name = str(origin)
    if "://" not in name and not Path(name).is_dir() and name not in presets.PRESETS:
        import keras_hub

        known = keras_hub.models.GemmaBackbone.presets
        if name not in known:
            gemma2 = [known_name for known_name in known if known_name.startswith("gemma2")]
            raise ValueError(
                f"Unknown preset {name!r}: it is not a folder here. keras-hub's Gemma 2 are {', '.join(gemma2)}. A hub "
                f"checkpoint is written hf://owner/name.{did_you_mean(name, gemma2)}"
            )
        origin = known[name]["kaggle_handle"]
    return _with_config(presets.locate(origin, config=False))


def _with_config(folder):
    try:
        return presets.locate(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _is_hugging_face(folder):
    """As `presets.is_hugging_face`; a `config.json` that tells neither is a damaged checkpoint."""
    read_json(folder / "config.json")
    try:
        return presets.is_hugging_face(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
