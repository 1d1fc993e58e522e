"""The options of a preprocessor that were saved with a checkpoint, in Keras's or Hugging Face's format."""

from collections.abc import Sequence
from typing import Any

from keras_t5gemma import strict_json
from keras_t5gemma.hub import PREPROCESSOR_FILE, PresetFolder

CLASS_KEY = "class"


def saved_options(folder: PresetFolder, class_name: str, names: Sequence[str], keras_file: str) -> dict[str, Any]:
    """The saved options of a preprocessor of one class; empty if the folder has another one's or none.

    Args:
        folder: the checkpoint's.
        class_name: the preprocessor's class.
        names: the options to take.
        keras_file: name of the file in Keras's format.

    Raises:
        ValueError: if the file is not a JSON object.
    """
    if (folder / PREPROCESSOR_FILE).is_file():
        saved = strict_json.read_object(folder / PREPROCESSOR_FILE)
        saved = saved if saved.get(CLASS_KEY) == class_name else {}
    elif (folder / keras_file).is_file():
        saved = strict_json.read_object(folder / keras_file)
        saved = saved.get("config", {}) if saved.get("class_name") == class_name else {}
    else:
        saved = {}
    return {name: saved[name] for name in names if name in saved}


def options_to_save(preprocessor: Any, names: Sequence[str]) -> dict[str, Any]:
    """The options of a preprocessor for Hugging Face's format, the inverse of `saved_options`."""
    return {CLASS_KEY: type(preprocessor).__name__, **{name: getattr(preprocessor, name) for name in names}}
