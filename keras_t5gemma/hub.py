"""Where presets lie: built-in names, hubs and folders, in Hugging Face's or Keras's format."""

import dataclasses
from pathlib import Path

from keras_t5gemma import strict_json
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.suggestions import did_you_mean

CONFIG_FILE = "config.json"
# Beside a Hugging Face checkpoint: what this package's preprocessor was told. Other programs ignore the file.
PREPROCESSOR_FILE = "keras_t5gemma_preprocessor.json"
PREPROCESSOR_OPTIONS = ("encoder_sequence_length", "decoder_sequence_length", "chat", "truncate")


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
    if config and not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds no `config.json`, so it is neither a Keras preset nor a Hugging Face folder.")
    return folder


@dataclasses.dataclass(frozen=True)
class PresetFolder:
    """A checkpoint's folder that has been found, and its `config.json`, which is parsed once.

    Attributes:
        path: a `pathlib.Path`.
        name: what was asked for: a preset's name, a hub's handle or the path.
        config: the parsed `config.json`, a dict; None if there is none.
    """

    path: Path
    name: str
    config: dict | None

    def __truediv__(self, file):
        return self.path / file

    def __fspath__(self):
        return str(self.path)

    def __str__(self):
        return str(self.path)

    @property
    def is_hugging_face(self):
        """Whether it is in Hugging Face's format (`model_type`), not in Keras's (`registered_name`).

        Raises:
            ValueError: if it is in neither.
        """
        if self.config is not None and ("model_type" in self.config or "registered_name" in self.config):
            return "model_type" in self.config
        path = self.path / CONFIG_FILE
        raise ValueError(f"{path} has neither `model_type` (Hugging Face) nor `registered_name` (Keras).")

    @property
    def instruction_tuned(self):
        """Whether the model reads prompts in turns: by its name if it is published, else if it has a chat template.

        Raises:
            ValueError: if the folder's `tokenizer_config.json` is not a JSON object.
        """
        for known in PRESETS.values():
            kaggle = known.kaggle_handle
            if self.name in (known.name, known.hf_handle, kaggle, kaggle.rpartition("/")[0]):
                return known.instruction_tuned
        if (self.path / "chat_template.jinja").is_file():
            return True
        path = self.path / "tokenizer_config.json"
        return path.is_file() and bool(strict_json.read_object(path).get("chat_template"))

    def preprocessor_options(self, keras_file="preprocessor.json"):
        """What the checkpoint says of its preprocessor, in Keras's or Hugging Face's format.

        Args:
            keras_file: the preprocessor's config in Keras's format.

        Returns:
            Those of `PREPROCESSOR_OPTIONS` that were saved, by name.

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


def open_preset(origin, weights=True, *, config_file=CONFIG_FILE):
    """The folder of a preset, downloaded if it is not there yet, with its config.

    Args:
        origin: as for `locate`; or a `PresetFolder`, which is returned as it is.
        weights: as for `locate`.
        config_file: a file that is there in a folder without `config.json`, such as a saved tokenizer's alone; None
            for a folder of any kind, such as Flax's checkpoints.

    Returns:
        A `PresetFolder`.

    Raises:
        ValueError: as `locate`, and if `config.json` is not a JSON object.
        ConnectionError: as `locate`.
    """
    if isinstance(origin, PresetFolder):
        return origin
    folder = Path(str(origin))
    if config_file is None or not (folder / config_file).is_file():
        folder = locate(origin, weights, config=config_file is not None)
    path = folder / CONFIG_FILE
    return PresetFolder(folder, str(origin), strict_json.read_object(path) if path.is_file() else None)


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
