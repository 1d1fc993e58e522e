"""Where presets lie: built-in names, hubs and folders, in Hugging Face's or Keras's format."""

import json
from pathlib import Path

from keras_t5gemma.presets import PRESETS
from keras_t5gemma.suggestions import did_you_mean


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
    """The local folder, or file, of a checkpoint on a hub."""
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
