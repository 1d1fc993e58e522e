"""Captures and restores the state of a training model: weights, optimizer, metrics."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_t5gemma.checkpoints.hugging_face.export import ModelTensors, write_checkpoint
from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.load import load_into
from keras_t5gemma.checkpoints.processes import process_count, process_index
from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError, TensorSource, flat_pieces, is_finite
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.checkpoints.transforms import MeanTensors
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.training.checkpointing import shards
from keras_t5gemma.training.checkpointing.process_folders import part_of
from keras_t5gemma.training.checkpointing.step_folder import MODEL_FOLDER

# A value in an error message is cut here.
_MOST_CHARACTERS = 200


def host_copy(model: keras.Model) -> tuple[dict, dict[str, np.ndarray], dict | None]:
    """Copies the state of a training model to the host's memory, for another thread to write.

    A single process copies whole arrays, gathered under a `keras.distribution`. Of several, each copies its shards.

    Args:
        model: a compiled and built `keras.Model`.

    Returns:
        `(content, arrays, model_arguments)`: metadata of the arrays, JSON-ready; numpy arrays by name; and the `model`
        argument of `write_step`. The latter is None if the model does not have the plain weights of a T5Gemma, or is in
        several processes; its weights then are among the arrays.
    """
    backbone = _plain_backbone(model)
    if process_count() > 1:
        arrays, shapes = shards.local_shards(_named(model, None))
        t5gemma = _t5gemma(model, backbone) if backbone is not None and process_index() == 0 else None
        return {"layout": shards.layout(), "shapes": shapes, "t5gemma": t5gemma}, arrays, None
    copies = {name: shards.host_array(variable) for name, variable in _named(model, backbone).items()}
    return {}, copies, None if backbone is None else _model_arguments(model, backbone)


def description(model: keras.Model) -> dict:
    """A description of a model and its optimizer, JSON-ready, to compare a checkpoint with them."""
    backbone = getattr(model, "backbone", model)
    config = backbone.get_config() if isinstance(getattr(backbone, "config", None), T5GemmaConfig) else {}
    optimizer = keras.optimizers.serialize(model.optimizer)
    # Not the metrics' variables, which are created in the first step on TensorFlow.
    groups = {"model": model.variables, "optimizer": model.optimizer.variables}
    return {
        "model": _json({name: value for name, value in config.items() if name != "name"}),
        "optimizer": _json(_without_names_and_rates(optimizer)),
        "variables": {name: [_describe(variable) for variable in group] for name, group in groups.items()},
    }


def metrics_description(model: keras.Model) -> list[list]:
    """A description of the variables of a model's metrics, JSON-ready; empty before they are created."""
    return [_describe(variable) for variable in model.metrics_variables]


def build_metrics(model: keras.Model, batch) -> None:
    """Creates the variables of metrics if Keras has not yet.

    On TensorFlow Keras creates them within the first step, too late to restore them; on the other backends before the
    first epoch, by the private function that is called here.

    Args:
        model: a compiled model.
        batch: a batch of the dataset that is passed to `fit`.
    """
    if keras.config.backend() == "tensorflow":
        if hasattr(model, "preprocess_samples"):  # keras-hub's models accept texts too
            batch = model.preprocess_samples(*keras.utils.unpack_x_y_sample_weight(batch))
        model._symbolic_build(data_batch=batch)


def check(model: keras.Model, expected: dict, path: Path) -> None:
    """Compares a model and its optimizer with a checkpoint's.

    Args:
        model: a compiled model.
        expected: the `description` in the checkpoint.
        path: the checkpoint, for the error.

    Raises:
        CheckpointError: if they differ; the message names the checkpoint, the difference and the remedy.
    """
    actual = description(model)
    for part, title in (("model", "model's config"), ("optimizer", "optimizer")):
        if difference := _first_difference(actual[part], expected[part]):
            name, now, before = difference
            raise CheckpointError(
                f"{path} is of another {title}: {name} was {_short(before)}, and is {_short(now)}. Compile the model "
                f"of that run to resume it, or choose another `folder` to begin anew."
            )
    for group in actual["variables"]:
        check_variables(actual["variables"][group], expected["variables"][group], group, path)


def check_variables(actual: list[list], expected: list[list], group: str, path: Path) -> None:
    """Compares two lists of `[path, shape, dtype, trainable]`.

    Args:
        actual: the model's list.
        expected: the checkpoint's list.
        group: the name of the list, for the error.
        path: the checkpoint, for the error.

    Raises:
        CheckpointError: if they differ, as for `check`.
    """
    for now, before in zip(actual, expected, strict=False):
        if now != before:
            raise CheckpointError(
                f"{path} is of another {group}: where it has {_text(before)}, this one has {_text(now)}. Build that "
                f"run's model (with its LoRA, dtype and optimizer) to resume it, or choose another `folder`."
            )
    if len(actual) != len(expected):
        raise CheckpointError(
            f"{path} is of another {group}: it has {len(expected)} variables, and this one {len(actual)}."
        )


def restore(model: keras.Model, path: Path, content: dict) -> None:
    """Restores weights and optimizer state, in the layout of the model's variables.

    Args:
        model: a compiled and built model.
        path: a checkpoint.
        content: its metadata.
    """
    _restore_backbone(model, [path])
    _restore_groups(model, [(path, content)], ("model", "optimizer"))


def restore_metrics(model: keras.Model, path: Path, content: dict) -> None:
    """Restores the metrics of a model.

    Args:
        model: a compiled model.
        path: a checkpoint.
        content: its metadata.
    """
    _restore_groups(model, [(path, content)], ("metrics",))


def restore_weights(model: keras.Model, checkpoints: list[tuple[Path, dict]]) -> None:
    """Restores only the weights, or the mean of the weights of several checkpoints; the model need not be compiled.

    Args:
        model: the model.
        checkpoints: a list of paths and metadata, oldest first.

    Raises:
        CheckpointError: if a checkpoint is of another model.
    """
    actual = [_describe(variable) for variable in model.variables]
    for path, content in checkpoints:
        check_variables(actual, content["run"]["variables"]["model"], "model", path)
    _restore_backbone(model, [path for path, _ in checkpoints])
    _restore_groups(model, checkpoints, ("model",))


def write_model(path: Path, content: dict) -> None:
    """Assembles the weights from a checkpoint's parts, tensor by tensor, and writes them as a Hugging Face folder.

    Args:
        path: the first process's part, in which the folder is written; the other parts are read beside it.
        content: its metadata, with a plain T5Gemma.
    """
    t5gemma = content["t5gemma"]
    config = T5GemmaConfig.from_dict(t5gemma["config"])
    proto = t5gemma["proto"]
    write_checkpoint(
        path / MODEL_FOLDER,
        config,
        shards.SavedTensors(shards.SavedArrays(path, content), tensor_specs(config)),
        proto=None if proto is None else base64.b64decode(proto),
        chat=t5gemma["chat"],
        allow_non_finite=True,
    )


def check_finite(copies: dict[str, np.ndarray], model_arguments: dict | None) -> None:
    """Checks that all weights are finite.

    Args:
        copies: the arrays of `host_copy`.
        model_arguments: the model arguments of `host_copy`.

    Raises:
        FloatingPointError: if a weight is not; the message names it.
    """
    for name, array in copies.items():
        if name.startswith("model/") and array.dtype in DTYPES.values():
            _check_finite(name, array)
    if model_arguments is not None:
        source = model_arguments["source"]
        for name in source.names():
            _check_finite(name, source.read(name))


def _check_finite(name: str, array: np.ndarray) -> None:
    if not all(is_finite(piece) for piece in (flat_pieces(array) if array.ndim else [array.reshape(1)])):
        raise FloatingPointError(f"The weight {name} holds infinities or NaNs.")


class _Copies(TensorSource):
    """Copies of a backbone's weights, under Hugging Face's names."""

    def __init__(self, backbone: keras.Model):
        live = ModelTensors(backbone)
        self._arrays = {name: np.array(live.read(name), copy=True) for name in live.names()}
        self._title = live.where()

    def names(self) -> list[str]:
        """Hugging Face's names."""
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape as Hugging Face stores it."""
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The variable's dtype."""
        return self._arrays[name].dtype

    def read(self, name: str) -> np.ndarray:
        """The copy itself."""
        return self._arrays[name]

    def where(self, name: str | None = None) -> str:
        """The model, and the tensor's name in it."""
        return self._title if name is None else f"{self._title} ({name})"


def _plain_backbone(model: keras.Model) -> keras.Model | None:
    """The model's T5Gemma, if its weights are those of a Hugging Face T5Gemma: no LoRA, not quantized. Else None."""
    backbone = getattr(model, "backbone", model)
    config = getattr(backbone, "config", None)
    if not isinstance(config, T5GemmaConfig):
        return None
    plain = {tensor.path for tensor in tensor_specs(config)} == {weight.path for weight in backbone.weights}
    return backbone if plain and len({str(weight.dtype) for weight in backbone.weights}) == 1 else None


def _model_arguments(model: keras.Model, backbone: keras.Model) -> dict[str, Any]:
    """The arguments of `write_checkpoint` for copies of a backbone's weights."""
    proto, chat = _tokenizer(model)
    return {"config": backbone.config, "source": _Copies(backbone), "proto": proto, "chat": chat}


def _t5gemma(model: keras.Model, backbone: keras.Model) -> dict:
    """The metadata that `write_model` reads beside the weights, JSON-ready."""
    proto, chat = _tokenizer(model)
    proto = None if proto is None else base64.b64encode(proto).decode()
    return {"config": _json(backbone.config.to_dict()), "proto": proto, "chat": chat}


def _tokenizer(model: keras.Model) -> tuple[bytes | None, bool]:
    """The SentencePiece model of a model's preprocessor, or None, and whether the preprocessor is for chats."""
    preprocessor = getattr(model, "preprocessor", None)
    proto = None if preprocessor is None else preprocessor.tokenizer.proto
    proto = proto if isinstance(proto, bytes) else None
    return proto, proto is not None and bool(getattr(preprocessor, "chat", False))


def _restore_backbone(model: keras.Model, paths: list[Path]) -> None:
    """Restores a T5Gemma's weights from the Hugging Face folders of checkpoints, or their mean, if there are any."""
    backbone = _plain_backbone(model)
    if backbone is not None and part_of(paths[0]) is None:
        sources = [CheckpointFolder(path / MODEL_FOLDER) for path in paths]
        load_into(backbone, backbone.config, sources[0] if len(sources) == 1 else MeanTensors(sources))


def _restore_groups(model: keras.Model, checkpoints: list[tuple[Path, dict]], groups: Sequence[str]) -> None:
    """Restores groups of variables from the arrays of a checkpoint, or their mean over several.

    Args:
        model: the model.
        checkpoints: a list of paths and metadata, oldest first.
        groups: as for `_named`.
    """
    saved = [shards.SavedArrays(path, content) for path, content in checkpoints]
    backbone = _plain_backbone(model) if part_of(checkpoints[0][0]) is None else None
    named = _named(model, backbone, groups)
    # By position: in a second model of the same program Keras gives some variables other names.
    for name, *saved_names in zip(sorted(named), *(arrays.names(groups) for arrays in saved), strict=True):
        shards.fill(named[name], shards.mean_reader(saved, saved_names))


def _named(
    model: keras.Model,
    backbone: keras.Model | None,
    groups: Sequence[str] = ("model", "optimizer", "metrics"),
) -> dict[str, keras.Variable]:
    """The variables that are saved among the arrays, by names that sort by group and position.

    Args:
        model: the model.
        backbone: a T5Gemma whose weights are saved elsewhere, or None.
        groups: some of "model", "optimizer" and "metrics".
    """
    elsewhere = set() if backbone is None else {id(variable) for variable in backbone.weights}
    named = {}
    for group in groups:
        # A model's `variables` include the random state of dropout, and an optimizer's all that it accumulates.
        variables = {
            "model": lambda: model.variables,
            "optimizer": lambda: model.optimizer.variables,
            "metrics": lambda: model.metrics_variables,
        }[group]()
        for position, variable in enumerate(variables):
            if id(variable) not in elsewhere:
                named[f"{group}/{position:06d}/{variable.path}"] = variable
    return named


def _describe(variable: keras.Variable) -> list:
    """`[path, shape, dtype, trainable]` of a variable, JSON-ready and comparable between programs."""
    dtype = str(variable.dtype)
    # Backends count in different integer dtypes. Keras numbers layers without a name by the layers built before.
    dtype = "integer" if "int" in dtype else dtype
    path = re.sub(r"_\d+(?=[/_]|$)", "", variable.path)
    return [path, [int(size) for size in variable.shape], dtype, bool(variable.trainable)]


def _text(entry: list) -> str:
    """The text of a result of `_describe`, for errors."""
    path, shape, dtype, trainable = entry
    return f"{path} {dtype} {shape}" + ("" if trainable else ", not trainable")


def _json(value):
    """A value as JSON holds it, so that it equals one that was read from a file."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def _without_names_and_rates(value):
    """A config without names, which Keras numbers, and without numeric learning rates, which are saved as variables."""
    if isinstance(value, dict):
        return {
            name: _without_names_and_rates(item)
            for name, item in value.items()
            if name != "name" and not (name == "learning_rate" and isinstance(item, (int, float)))
        }
    return value


def _short(value) -> str:
    """A value as text, cut if it is long, such as the layers of LoRA."""
    text = str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."


def _first_difference(actual, expected, name: str = "") -> tuple | None:
    """`(name, actual, expected)` of the first item in which two configs differ, or None.

    Args:
        actual: a config, or a part of one.
        expected: the config to compare it with.
        name: the part's name, with dots.
    """
    if isinstance(actual, dict) and isinstance(expected, dict):
        for key in sorted({*actual, *expected}):
            if difference := _first_difference(actual.get(key), expected.get(key), f"{name}.{key}" if name else key):
                return difference
        return None
    return None if actual == expected else (name, actual, expected)
