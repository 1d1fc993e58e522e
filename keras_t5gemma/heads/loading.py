"""Classifiers from presets: the stacks from any T5Gemma, the head from a classifier's folder or new."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checkpoints.hugging_face.config import ARCHITECTURE, ARCHITECTURES
from keras_t5gemma.checkpoints.hugging_face.heads import Head, read_head
from keras_t5gemma.checkpoints.keras_formats.presets import saved_task
from keras_t5gemma.checkpoints.sources import open_t5gemma, stacks_source
from keras_t5gemma.config import T5GemmaEncoderConfig
from keras_t5gemma.hub import PresetFolder
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.encoder import T5GemmaEncoder
from keras_t5gemma.suggestions import check_keywords

TASK_WEIGHTS_FILE, TOKENIZER_FILE = "task.weights.h5", "tokenizer.json"
# Arguments that describe a head's classes, and so are not kept for a new head.
_OF_CLASSES = ("num_classes", "labels", "problem")


def classifier_from_preset(cls: Any, preset: str | Path | PresetFolder, load_weights: bool, kwargs: Mapping) -> Any:
    """The `from_preset` of a classifier.

    Args:
        cls: the class. Its `SAVED` are the arguments that presets store.
        preset: of `from_preset`, like the following arguments.
        load_weights: whether to load weights.
        kwargs: arguments of the class and `dtype`.
    """
    check_keywords(cls, kwargs, (*cls.SAVED, "dtype", "preprocessor", "name", "trainable", "compile"))
    kwargs = dict(kwargs)
    folder = open_t5gemma(preset)
    hugging_face = folder.config is not None and folder.is_hugging_face
    saved = _from_hugging_face(cls, folder) if hugging_face else _from_keras(cls, folder)
    is_new = kwargs.get("num_classes") is not None
    if is_new:
        if saved:
            warn_caller(
                f"The head in {folder.name}, of {saved['num_classes']} classes, is not loaded: `num_classes` was "
                f"passed, so the head is new and has to be trained. Leave `num_classes` out to load it."
            )
        saved = {name: value for name, value in saved.items() if name not in _OF_CLASSES}
    elif not saved:
        raise ValueError(
            f"{folder.name} has no head of a {cls.__name__}: {_description(folder, hugging_face)}. Pass `num_classes` "
            f"for a new head."
        )
    stack = kwargs.get("stack", saved.get("stack", "encoder"))
    dtype = {name: kwargs.pop(name) for name in ("dtype",) if name in kwargs}
    if stack == "encoder":
        backbone = T5GemmaEncoder.from_preset(folder, load_weights=load_weights, **dtype)
    elif isinstance(stacks_source(folder).config, T5GemmaEncoderConfig):
        raise ValueError(f'stack="decoder" needs a T5Gemma with a decoder. Received: {folder.name}, an encoder alone.')
    else:
        backbone = T5GemmaBackbone.from_folder(folder, stacks_source, load_weights=load_weights, **dtype)
    if "preprocessor" not in kwargs:
        has_one = hugging_face or (folder / TOKENIZER_FILE).is_file()
        kwargs["preprocessor"] = cls.preprocessor_cls.from_preset(folder) if has_one else None
    model = cls(backbone, **{**saved, **kwargs})
    if is_new or not load_weights:
        return model
    if hugging_face:
        head = _head(folder, stack, backbone.config)
        model.head.kernel.assign(head.kernel)
        model.head.bias.assign(head.bias)
    else:
        model.load_task_weights(str(folder / TASK_WEIGHTS_FILE))
    return model


def _from_keras(cls: Any, folder: PresetFolder) -> dict[str, Any]:
    """The arguments that `save_to_preset` of the class stored; empty if the folder is another model's."""
    task = saved_task(folder)
    if task.get("registered_name") != f"keras_t5gemma>{cls.__name__}":
        return {}
    return {name: task["config"][name] for name in cls.SAVED if name in task["config"]}


def _from_hugging_face(cls: Any, folder: PresetFolder) -> dict[str, Any]:
    """The arguments in `config.json` of the class's architecture; empty if the folder is another model's."""
    values = folder.config or {}
    if values.get("architectures") != [cls.ARCHITECTURE]:
        return {}
    stack = "encoder" if values.get("is_encoder_decoder") is False else "decoder"
    head = _head(folder, stack, stacks_source(folder).config)
    fields = {"num_classes": head.num_classes, "labels": head.labels, "problem": head.problem}
    fields |= {"dropout": head.dropout, "stack": stack}
    return {name: value for name, value in fields.items() if name in cls.SAVED}


def _head(folder: PresetFolder, stack: str, config: Any) -> Head:
    return read_head(folder.path, folder.config or {}, getattr(config, stack).hidden_dim)


def _description(folder: PresetFolder, hugging_face: bool) -> str:
    """What a folder holds, for an error."""
    if hugging_face:
        architecture = ((folder.config or {}).get("architectures") or [ARCHITECTURE])[0]
        return f"it is a {architecture}, for `{ARCHITECTURES.get(architecture, 'T5GemmaSeq2SeqLM')}`"
    name = str(saved_task(folder).get("registered_name", "the stacks alone")).rpartition(">")[2]
    return f"it is a preset of {name}"
