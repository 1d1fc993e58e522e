"""Finds presets: built-in names, hub handles and folders, in Hugging Face's or Keras's format."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from keras_t5gemma import strict_json
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.suggestions import did_you_mean

CONFIG_FILE = "config.json"
# The options of this package's preprocessor, beside a Hugging Face checkpoint. Other programs ignore the file.
PREPROCESSOR_FILE = "keras_t5gemma_preprocessor.json"
PREPROCESSOR_OPTIONS = ("encoder_sequence_length", "decoder_sequence_length", "chat", "truncate")


def locate(preset: str | os.PathLike[str], weights: bool = True, *, config: bool = True) -> Path:
    """The local folder of a preset, which is downloaded unless it is there already.

    Args:
        preset: a name in `PRESETS`, "hf://owner/name", "kaggle://owner/model/framework/variation[/version]", or a
            folder.
        weights: whether to download the weights of a Hugging Face checkpoint too; False e.g. for its tokenizer alone.
        config: whether the folder must hold a `config.json`. Flax's checkpoints have none.

    Returns:
        The folder's path. The folder holds a `config.json`, if `config` is true.

    Raises:
        ValueError: if the name is unknown and no such folder exists, or the folder has no `config.json`.
        ConnectionError: if the download failed; the message names the checkpoint and the site.
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
            f"Unknown preset {text!r}: it is not a folder here, nor one of the {len(PRESETS)} built-in names "
            f"({', '.join(list(PRESETS)[:3])}, ...; `keras-t5gemma presets` lists them). A hub checkpoint is written "
            f"hf://owner/name or kaggle://owner/model/keras/variation.{did_you_mean(text, PRESETS)}"
        )
    if config and not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds no `config.json`, so it is neither a Keras preset nor a Hugging Face folder.")
    return folder


@dataclasses.dataclass(frozen=True)
class PresetFolder:
    """The local folder of a checkpoint, and its `config.json`, which is parsed once.

    Attributes:
        path: the folder's path.
        name: the name that the caller passed: a preset's name, a hub's handle or the path.
        config: the parsed `config.json`, or None if the folder has none.
    """

    path: Path
    name: str
    config: dict[str, Any] | None

    def __truediv__(self, file: str) -> Path:
        return self.path / file

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_hugging_face(self) -> bool:
        """Whether the format is Hugging Face's (the config has `model_type`) and not Keras's (`registered_name`).

        Raises:
            ValueError: if the config has neither.
        """
        if self.config is not None and ("model_type" in self.config or "registered_name" in self.config):
            return "model_type" in self.config
        path = self.path / CONFIG_FILE
        raise ValueError(f"{path} has neither `model_type` (Hugging Face) nor `registered_name` (Keras).")

    @property
    def instruction_tuned(self) -> bool:
        """Whether the model reads prompts in turns. A published name says so; other folders have a chat template.

        Raises:
            ValueError: if the folder's `tokenizer_config.json` is not a JSON object.
        """
        for preset in PRESETS.values():
            kaggle = preset.kaggle_handle
            if self.name in (preset.name, preset.hf_handle, kaggle, kaggle.rpartition("/")[0]):
                return preset.instruction_tuned
        if (self.path / "chat_template.jinja").is_file():
            return True
        path = self.path / "tokenizer_config.json"
        return path.is_file() and bool(strict_json.read_object(path).get("chat_template"))

    def preprocessor_options(self, keras_file: str = "preprocessor.json") -> dict[str, Any]:
        """The preprocessor's options that were saved with the checkpoint, in Keras's or Hugging Face's format.

        Args:
            keras_file: name of the file with the preprocessor's config in Keras's format.

        Returns:
            `{name: value}` for each name in `PREPROCESSOR_OPTIONS` that was saved.

        Raises:
            ValueError: if the file is not a JSON object with options.
        """
        path = next((self / name for name in (PREPROCESSOR_FILE, keras_file) if (self / name).is_file()), None)
        if path is None:
            return {}
        try:
            saved = strict_json.read_object(path)
            saved = saved if path.name == PREPROCESSOR_FILE else saved["config"]
            return {name: saved[name] for name in PREPROCESSOR_OPTIONS if name in saved}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a preprocessor's config ({type(error).__name__}: {error}).") from error


def open_preset(
    origin: str | os.PathLike[str] | PresetFolder, weights: bool = True, *, config_file: str | None = CONFIG_FILE
) -> PresetFolder:
    """The local folder of a preset, downloaded unless it is there already, with its parsed config.

    Args:
        origin: as for `locate`; or a `PresetFolder`, which is returned as it is.
        weights: as for `locate`.
        config_file: the file by which a folder without `config.json` is accepted, e.g. a saved tokenizer's; None to
            accept any folder, e.g. Flax's checkpoints.

    Returns:
        A `PresetFolder`.

    Raises:
        ValueError: as for `locate`, and if `config.json` is not a JSON object.
        ConnectionError: as for `locate`.
    """
    if isinstance(origin, PresetFolder):
        return origin
    folder = Path(str(origin))
    if config_file is None or not (folder / config_file).is_file():
        folder = locate(origin, weights, config=config_file is not None)
    path = folder / CONFIG_FILE
    return PresetFolder(folder, str(origin), strict_json.read_object(path) if path.is_file() else None)


def kaggle_file(handle: str, path: str) -> Path:
    """The local path of one file of a Kaggle checkpoint, which is downloaded unless it is there already.

    Args:
        handle: "kaggle://owner/model/framework/variation[/version]".
        path: the file's path within the checkpoint.

    Raises:
        ConnectionError: as for `locate`.
    """
    return _download(handle, path=path)


_LOGIN = {
    "hf": ("huggingface.co", "accept Gemma's licence there and log in with `hf auth login` or set HF_TOKEN"),
    "kaggle": ("kaggle.com", "accept Gemma's licence there and set KAGGLE_USERNAME and KAGGLE_KEY"),
}


def _download(handle: str, weights: bool = True, path: str | None = None) -> Path:
    """Downloads a checkpoint, or one file of it, from a hub; returns its local path.

    Args:
        handle: "hf://owner/name" or "kaggle://owner/model/framework/variation[/version]".
        weights: whether to download the weights of a Hugging Face checkpoint too.
        path: the one file to download from Kaggle, or None for the whole checkpoint.

    Raises:
        ConnectionError: if the download failed, for any reason.
    """
    scheme, _, name = handle.partition("://")
    try:
        if scheme == "hf":
            from huggingface_hub import snapshot_download

            # Weights in safetensors or h5 only: no pickle is ever downloaded.
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
