"""The published sizes, pairs and checkpoints: one row per size, everything else computed; and where a preset lies."""

import dataclasses
import json
from pathlib import Path

from keras_t5gemma.config import StackConfig
from keras_t5gemma.suggestions import did_you_mean

# One row per stack, from the model cards and `config.json` of google/t5gemma-* (2025):
#       layers, hidden, feed-forward, query heads, kv heads, head size
_SIZES = {
    "s": (8, 512, 1024, 8, 8, 64),
    "b": (12, 768, 2048, 12, 12, 64),
    "l": (24, 1024, 2816, 16, 16, 64),
    "ml": (26, 1152, 6912, 4, 4, 256),
    "xl": (24, 2048, 5120, 32, 32, 64),
    "2b": (26, 2304, 9216, 8, 4, 256),
    "9b": (42, 3584, 14336, 16, 8, 256),
}
STACKS = {name: StackConfig(*row) for name, row in _SIZES.items()}
PAIRS = (
    ("s", "s"),
    ("b", "b"),
    ("l", "l"),
    ("ml", "ml"),
    ("xl", "xl"),
    ("2b", "2b"),
    ("9b", "2b"),
    ("9b", "9b"),
)
OBJECTIVES = ("ul2", "prefixlm")


@dataclasses.dataclass(frozen=True)
class Preset:
    """One published checkpoint: its stacks, the objective it was trained with, and where it lies."""

    encoder: str
    decoder: str
    objective: str
    instruction_tuned: bool

    @property
    def name(self):
        """The name `from_preset` takes, e.g. "t5gemma_9b_2b_prefixlm_it"."""
        return f"t5gemma_{self._stem('_')}"

    @property
    def hf_handle(self):
        """The Hugging Face checkpoint, in `transformers` format."""
        return f"hf://google/t5gemma-{self._stem('-')}"

    @property
    def kaggle_handle(self):
        """The Kaggle checkpoint, in Keras format (keras-hub's own T5Gemma)."""
        return f"kaggle://keras/t5-gemma/keras/{self.name}/1"

    def _stem(self, joint):
        parts = [self.encoder, self.decoder, self.objective] + ["it"] * self.instruction_tuned
        return joint.join(parts)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(encoder, decoder, objective, tuned)
        for encoder, decoder in PAIRS
        for objective in OBJECTIVES
        for tuned in (False, True)
    )
}


def stack(size):
    """The `StackConfig` for a size name, a config or a mapping of fields.

    Args:
        size: one of `STACKS` ("s" .. "9b"), a `StackConfig`, or a mapping of its fields.

    Raises:
        ValueError: if the name is unknown or the value is invalid.
    """
    if isinstance(size, StackConfig):
        return size
    if isinstance(size, str):
        if size not in STACKS:
            raise ValueError(
                f"Unknown stack size {size!r}. Known sizes: {', '.join(STACKS)}.{did_you_mean(size, STACKS)}"
            )
        return STACKS[size]
    if isinstance(size, dict):
        return StackConfig.from_dict(size)
    raise ValueError(f"A stack is a size name ({', '.join(STACKS)}), a StackConfig or a dict. Received: {size!r}.")


def locate(preset, weights=True, *, config=True):
    """The local folder of a preset, downloaded if it is not there yet.

    Args:
        preset: a name in `PRESETS`, "hf://owner/name", "kaggle://owner/model/framework/variation[/version]", or a
            folder.
        weights: False to leave the weights of a Hugging Face checkpoint where they are, e.g. for its tokenizer alone.
        config: whether the folder must hold a `config.json`, which Flax's checkpoints do not.

    Returns:
        A `pathlib.Path` to a folder with a `config.json`.

    Raises:
        ValueError: if the name is unknown and no such folder exists, or the folder has no `config.json`.
        ConnectionError: if the download failed; the message names what was looked for and where.
    """
    text = str(preset)
    if text in PRESETS:
        folder = _download(PRESETS[text].hf_handle, weights)
    elif text.startswith(("hf://", "kaggle://")):
        folder = _download(text, weights)
    elif Path(text).is_dir():
        folder = Path(text)
    elif Path(text).is_file():
        remedy = f" Use `keras.models.load_model({text!r})`." if text.endswith(".keras") else ""
        raise ValueError(f"`preset` must be a name or a folder. Received: {text!r}, a file.{remedy}")
    else:
        raise ValueError(
            f"Unknown preset {text!r}: it is no folder here and none of the {len(PRESETS)} built-in names "
            f"({', '.join(list(PRESETS)[:3])}, ...; `keras-t5gemma presets` lists them). A hub checkpoint is written "
            f"hf://owner/name or kaggle://owner/model/keras/variation.{did_you_mean(text, PRESETS)}"
        )
    if config and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no `config.json`, so it is neither a Keras preset nor a Hugging Face folder.")
    return folder


def is_hugging_face(folder):
    """Whether a located folder is in Hugging Face format (`model_type`) rather than Keras's (`registered_name`)."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(config, dict) and ("model_type" in config or "registered_name" in config):
        return "model_type" in config
    raise ValueError(f"{path} has neither `model_type` (Hugging Face) nor `registered_name` (Keras).")


def wants_turns(preset, folder):
    """Whether a preset is instruction-tuned: by its name where it is published, else by having a chat template.

    Args:
        preset: what `from_preset` was given.
        folder: where that lies.

    Raises:
        ValueError: if the folder's `tokenizer_config.json` is not JSON.
    """
    for known in PRESETS.values():
        kaggle = known.kaggle_handle
        if str(preset) in (known.name, known.hf_handle, kaggle, kaggle.rpartition("/")[0]):
            return known.instruction_tuned
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}. Expected an object.")
    return bool(config.get("chat_template"))


# Beside a Hugging Face checkpoint: what this package's preprocessor was told. Other programs ignore the file.
PREPROCESSOR_FILE = "keras_t5gemma_preprocessor.json"
PREPROCESSOR_OPTIONS = ("encoder_sequence_length", "decoder_sequence_length", "chat", "truncate")


def preprocessor_options(folder, keras_file="preprocessor.json"):
    """What a checkpoint says of its preprocessor, in Keras's or Hugging Face's format.

    Args:
        folder: the checkpoint's.
        keras_file: the preprocessor's config in Keras's format.

    Returns:
        Those of `PREPROCESSOR_OPTIONS` that were saved, by name.

    Raises:
        ValueError: if the file is not JSON, or not an object with options.
    """
    path = next(
        (Path(folder) / name for name in (PREPROCESSOR_FILE, keras_file) if (Path(folder) / name).is_file()), None
    )
    if path is None:
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved = saved if path.name == PREPROCESSOR_FILE else saved["config"]
        return {name: saved[name] for name in PREPROCESSOR_OPTIONS if name in saved}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a preprocessor's config ({type(error).__name__}: {error}).") from error


def kaggle_file(handle, path):
    """One file of a Kaggle checkpoint, downloaded if it is not there yet.

    Args:
        handle: "kaggle://owner/model/framework/variation[/version]".
        path: the file's, within the checkpoint.

    Raises:
        ConnectionError: as for `locate`.
    """
    return _download(handle, path=path)


_LOGIN = {
    "hf": ("huggingface.co", "accept Gemma's licence there and log in with `hf auth login` or set HF_TOKEN"),
    "kaggle": ("kaggle.com", "accept Gemma's licence there and set KAGGLE_USERNAME and KAGGLE_KEY"),
}


def _download(handle, weights=True, path=None):
    scheme, _, name = handle.partition("://")
    try:
        if scheme == "hf":
            from huggingface_hub import snapshot_download

            # Weights in safetensors or h5 only: nothing that would have to be unpickled is ever fetched.
            patterns = ["*.json", "*.model", "*.jinja", "assets/**"] + ["*.safetensors", "*.h5"] * weights
            return Path(snapshot_download(name, allow_patterns=patterns))
        from kagglehub import model_download

        return Path(model_download(name) if path is None else model_download(name, path))
    except Exception as error:
        site, remedy = _LOGIN[scheme]
        raise ConnectionError(
            f"Could not get {name!r} from {site} for {handle!r} ({type(error).__name__}: {error}). Check the network; "
            f"if the model is gated, {remedy}; or pass the folder of a copy you already have."
        ) from error
