"""Opens the sources of weights: a folder, a hub, a preset or a model in memory becomes a config and lazy tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from keras_t5gemma import hub, presets
from keras_t5gemma.checkpoints.checks import check_depth, check_source, check_tensors
from keras_t5gemma.checkpoints.hugging_face.config import (
    Gemma2Config,
    read_gemma2_config,
    read_stacks_config,
    read_t5gemma_config,
)
from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.keras_formats.layouts import (
    GEMMA2,
    KERAS_HUB_T5GEMMA,
    OWN,
    OWN_ENCODER,
    AnyConfig,
    expected_tensors,
)
from keras_t5gemma.checkpoints.keras_formats.presets import KerasPreset
from keras_t5gemma.checkpoints.orbax.files import is_orbax
from keras_t5gemma.checkpoints.orbax.parameters import read_orbax_t5gemma
from keras_t5gemma.checkpoints.parts import of_encoder, of_stacks
from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource
from keras_t5gemma.config import T5GemmaConfig, T5GemmaEncoderConfig
from keras_t5gemma.suggestions import did_you_mean

if TYPE_CHECKING:
    import keras_hub


_ADAPT = "`keras_t5gemma.adapt_gemma2` makes a T5Gemma of a Gemma 2, `adapt_gemma2_files` one from files to files."


@dataclasses.dataclass(frozen=True)
class Source(Generic[AnyConfig]):
    """An opened checkpoint, whose tensors are those of its config. Its numbers are not read yet.

    Attributes:
        config: the model's `T5GemmaConfig`, `T5GemmaEncoderConfig` or `Gemma2Config`.
        tensors: the tensors, under Hugging Face's names and in Hugging Face's layout, whatever the checkpoint's format.
    """

    config: AnyConfig
    tensors: TensorSource


def t5gemma_source(
    origin: str | Path | hub.PresetFolder | keras_hub.models.T5GemmaBackbone | keras_hub.models.T5GemmaSeq2SeqLM,
) -> Source[T5GemmaConfig]:
    """Opens a T5Gemma and checks its names, shapes and dtypes.

    Args:
        origin: a name or folder that `hub.locate` takes: a checkpoint in Hugging Face's format, a Keras preset of this
            package or of keras-hub's own T5Gemma, or Flax's Orbax checkpoint; or a `keras_hub.models.T5GemmaBackbone`
            or `T5GemmaSeq2SeqLM`.

    Returns:
        A `Source` with a `T5GemmaConfig`.

    Raises:
        ValueError: if the preset is unknown.
        ConnectionError: if a download failed.
        CheckpointError: if it is another architecture, damaged or incomplete.
    """
    if not isinstance(origin, (str, Path, hub.PresetFolder)):
        from keras_t5gemma.checkpoints.keras_formats.models import read_t5gemma

        source = Source(*read_t5gemma(origin))
    else:
        folder = open_t5gemma(origin)
        if folder.config is None:
            source = Source(*read_orbax_t5gemma(folder.path))
        elif not _is_hugging_face(folder):
            tensors = KerasPreset(folder, (KERAS_HUB_T5GEMMA, OWN), folder.config)
            source = Source(tensors.config, tensors)
        else:
            tensors = CheckpointFolder(folder, folder.config)
            source = Source(read_t5gemma_config(tensors.config, str(folder / "config.json")), tensors)
    check_source(source.config, source.tensors)
    return source


def stacks_source(origin: str | Path | hub.PresetFolder) -> Source[Any]:
    """Opens the stacks of any model of T5Gemma: a generator, an encoder alone, or a classifier without its head.

    Args:
        origin: a name or folder as for `t5gemma_source`; or a folder of an encoder or a classifier, in Hugging Face's
            or Keras's format.

    Returns:
        A `Source` with a `T5GemmaConfig`, or with a `T5GemmaEncoderConfig` if the model has no decoder.

    Raises:
        ValueError, ConnectionError, CheckpointError: as for `t5gemma_source`.
    """
    folder = open_t5gemma(origin)
    if folder.config is None:
        source = Source(*read_orbax_t5gemma(folder.path))
    elif not _is_hugging_face(folder):
        preset = KerasPreset(folder, (KERAS_HUB_T5GEMMA, OWN, OWN_ENCODER), folder.config)
        source = Source(preset.config, preset)
    else:
        tensors = CheckpointFolder(folder, folder.config)
        source = Source(read_stacks_config(tensors.config, str(folder / "config.json")), of_stacks(tensors))
    check_source(source.config, source.tensors)
    return source


def encoder_source(origin: str | Path | hub.PresetFolder) -> Source[T5GemmaEncoderConfig]:
    """Opens the encoder of any model of T5Gemma, and checks names, shapes and dtypes of the whole model.

    Args:
        origin: as for `stacks_source`.

    Returns:
        A `Source` with a `T5GemmaEncoderConfig`. The decoder's tensors are not among its tensors.

    Raises:
        ValueError, ConnectionError, CheckpointError: as for `t5gemma_source`.
    """
    source = stacks_source(origin)
    config = source.config
    encoder = config.encoder_alone() if isinstance(config, T5GemmaConfig) else config
    return Source(encoder, of_encoder(encoder, source.tensors))


def gemma2_source(
    origin: str | Path | hub.PresetFolder | keras_hub.models.GemmaBackbone | keras_hub.models.GemmaCausalLM,
) -> Source[Gemma2Config]:
    """Opens a decoder-only Gemma 2, from which a T5Gemma is adapted, and checks its names, shapes and dtypes.

    Args:
        origin: a folder in Hugging Face's or Keras's format, "hf://owner/name", "kaggle://...", the name of one of
            keras-hub's presets such as "gemma2_2b_en"; or a `keras_hub.models.GemmaBackbone` or `GemmaCausalLM`.

    Returns:
        A `Source` with a `Gemma2Config`.

    Raises:
        ValueError: if the preset is unknown.
        ConnectionError: if a download failed.
        CheckpointError: if it is another architecture (Gemma 1 and 3 included), damaged or incomplete.
    """
    if not isinstance(origin, (str, Path, hub.PresetFolder)):
        from keras_t5gemma.checkpoints.keras_formats.models import read_gemma2

        source = Source(*read_gemma2(origin))
    else:
        folder = open_gemma2(origin)
        if _is_hugging_face(folder):
            tensors = CheckpointFolder(folder, folder.config)
            source = Source(read_gemma2_config(tensors.config, str(folder / "config.json")), tensors)
        else:
            tensors = KerasPreset(folder, (GEMMA2,), folder.config)
            source = Source(tensors.config, tensors)
    check_depth(source.tensors, "Gemma 2", source.config.stack)
    shapes = {name: tensor.stored_shape for name, tensor in expected_tensors(source.config).items()}
    check_tensors(source.tensors, shapes, "Gemma 2")
    return source


def open_t5gemma(origin: str | Path | hub.PresetFolder) -> hub.PresetFolder:
    """The `PresetFolder` of a T5Gemma. Also opens Flax's checkpoints, which have no `config.json`.

    Raises:
        ValueError, ConnectionError: as for `hub.open_preset`.
        CheckpointError: as for `open_checkpoint`; or if the folder holds a Gemma 2. The message names `adapt_gemma2`.
    """
    if not isinstance(origin, hub.PresetFolder) and str(origin).startswith("gemma2") and not Path(origin).exists():
        raise ValueError(f"Unknown preset {str(origin)!r}: it is not a folder here, nor a T5Gemma's name. {_ADAPT}")
    folder = open_checkpoint(origin)
    config = folder.config or {}
    if config.get("model_type") == "gemma2":
        raise CheckpointError(f"{folder / 'config.json'}: `model_type` is 'gemma2'. Expected 't5gemma'. {_ADAPT}")
    if (name := config.get("registered_name")) in GEMMA2.registered_names:
        expected = KERAS_HUB_T5GEMMA.registered_names[0]
        raise CheckpointError(f"{folder / 'config.json'}: a Keras preset of {name}. Expected {expected}. {_ADAPT}")
    return folder


def open_checkpoint(origin: str | Path | hub.PresetFolder) -> hub.PresetFolder:
    """The `PresetFolder` of a checkpoint of any architecture, Flax's included.

    Raises:
        ValueError, ConnectionError: as for `hub.open_preset`.
        CheckpointError: if the folder holds neither a `config.json` nor a Flax checkpoint, or a damaged `config.json`.
    """
    return origin if isinstance(origin, hub.PresetFolder) else _open(origin, is_orbax)


def open_gemma2(origin: str | Path | hub.PresetFolder) -> hub.PresetFolder:
    """The `PresetFolder` of a Gemma 2. Also takes the names of keras-hub's presets.

    Raises:
        ValueError, ConnectionError: as for `hub.open_preset`.
        CheckpointError: if the folder has no `config.json`, or a damaged one.
    """
    if isinstance(origin, hub.PresetFolder):
        return origin
    name = str(origin)
    if "://" not in name and not Path(name).is_dir() and name not in presets.PRESETS:
        import keras_hub

        handles: Any = keras_hub.models.GemmaBackbone.presets  # a dict; keras-hub's `classproperty` has no type
        if name not in handles:
            gemma2 = [preset for preset in handles if preset.startswith("gemma2")]
            raise ValueError(
                f"Unknown preset {name!r}: it is not a folder here. keras-hub's Gemma 2 are {', '.join(gemma2)}. A hub "
                f"checkpoint is written hf://owner/name.{did_you_mean(name, gemma2)}"
            )
        origin = str(handles[name]["kaggle_handle"])
    return _open(origin)


def _open(origin: str | Path, accepts: Callable[[Path], bool] | None = None) -> hub.PresetFolder:
    """The `PresetFolder` of a checkpoint.

    Args:
        origin: a name or folder that `hub.locate` takes.
        accepts: whether a folder without `config.json` is accepted; None to refuse all of them.

    Raises:
        ValueError, ConnectionError: as for `hub.locate`.
        CheckpointError: if the folder has no `config.json` and is not accepted, or its `config.json` is damaged.
    """
    path = hub.locate(origin, config=False)
    without_config = accepts is not None and not (path / hub.CONFIG_FILE).is_file() and accepts(path)
    try:
        folder = hub.open_preset(path, config_file=None if without_config else hub.CONFIG_FILE)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return dataclasses.replace(folder, name=str(origin))


def _is_hugging_face(folder: hub.PresetFolder) -> bool:
    """`folder.is_hugging_face`; raises a `CheckpointError` if `config.json` is of neither format."""
    try:
        return folder.is_hugging_face
    except ValueError as error:
        raise CheckpointError(str(error)) from error
