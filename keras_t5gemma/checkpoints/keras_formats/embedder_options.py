"""The options of a `T5GemmaTextEmbedder` that were saved with a checkpoint."""

from typing import Any

from keras_t5gemma import strict_json
from keras_t5gemma.checkpoints.hugging_face.modules import OPTIONS, read_modules
from keras_t5gemma.checkpoints.keras_formats.presets import TASK_FILE
from keras_t5gemma.hub import PresetFolder

_REGISTERED_NAME = "keras_t5gemma>T5GemmaTextEmbedder"


def embedder_options(folder: PresetFolder) -> dict[str, Any]:
    """The options of an embedder that were saved with a checkpoint, in Keras's or in sentence-transformers' format.

    Args:
        folder: the checkpoint's.

    Returns:
        `pooling`, `normalize` and `dimensions`, which sentence-transformers' format has only if vectors are cut. An
        empty dict if the checkpoint is no embedder's.

    Raises:
        CheckpointError: if the folder has modules that a `T5GemmaTextEmbedder` does not have, or damaged files.
        ValueError: if the saved task is not a JSON object.
    """
    if folder.config is None:
        return {}
    if folder.is_hugging_face:
        return read_modules(folder.path)
    path = folder / TASK_FILE
    saved = strict_json.read_object(path) if path.is_file() else {}
    if saved.get("registered_name") != _REGISTERED_NAME:
        return {}
    return {name: saved["config"][name] for name in OPTIONS}
