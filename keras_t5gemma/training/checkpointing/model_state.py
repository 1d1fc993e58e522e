"""Captures and restores the state of a training run: weights, optimizer, metrics, random generators."""

import base64
import json
import random
import re

import keras
import numpy as np

from keras_t5gemma._keras_internals import global_seed_generator, variable_array
from keras_t5gemma.checkpoints.hugging_face.export import ModelTensors, write_checkpoint
from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.load import load_into
from keras_t5gemma.checkpoints.processes import process_count, process_index
from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError, TensorSource, flat_pieces, is_finite
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.checkpoints.transforms import MeanTensors
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.training.checkpointing import shards as arrays
from keras_t5gemma.training.checkpointing.process_folders import part_of
from keras_t5gemma.training.checkpointing.step_folder import MODEL_FOLDER


def host_copy(model):
    """Copies of everything that changes as a model trains, in the host's memory, for another thread to write.

    In one process arrays are whole: under a `keras.distribution` they are gathered. Of several, each copies its shards.

    Args:
        model: a compiled and built `keras.Model`.

    Returns:
        `(content, arrays, model_arguments)`: what to say of the arrays, JSON-ready; numpy arrays by name; and what
        `write_step` takes as `model`, or None where the model has no T5Gemma's plain weights, or is in parts: those
        weights then are among the arrays.
    """
    backbone = _plain_backbone(model)
    if process_count() > 1:
        saved, shapes = arrays.shards(_named(model, None))
        t5gemma = _t5gemma(model, backbone) if backbone is not None and process_index() == 0 else None
        return {"layout": arrays.layout(), "shapes": shapes, "t5gemma": t5gemma}, saved, None
    copies = {name: _copy(variable) for name, variable in _named(model, backbone).items()}
    return {}, copies, None if backbone is None else _model_arguments(model, backbone)


def description(model):
    """What a model and its optimiser are, to tell whether a checkpoint is theirs; JSON-ready."""
    backbone = getattr(model, "backbone", model)
    config = backbone.get_config() if isinstance(getattr(backbone, "config", None), T5GemmaConfig) else {}
    optimizer = keras.optimizers.serialize(model.optimizer)
    # Not the metrics' variables, which on TensorFlow are made in the first step.
    groups = {"model": model.variables, "optimizer": model.optimizer.variables}
    return {
        "model": _json({name: value for name, value in config.items() if name != "name"}),
        "optimizer": _json(_without_names_and_rates(optimizer)),
        "variables": {name: [_describe(variable) for variable in group] for name, group in groups.items()},
    }


def metrics_description(model):
    """The variables of a model's metrics, once they are there; JSON-ready."""
    return [_describe(variable) for variable in model.metrics_variables]


def build_metrics(model, batch):
    """Makes the variables of metrics where Keras has not yet.

    On TensorFlow it makes them within the first step, too late to restore them; on the others before the first epoch,
    by the function called here, which it keeps to itself.

    Args:
        model: a compiled model.
        batch: of the dataset that `fit` gets.
    """
    if keras.config.backend() == "tensorflow":
        if hasattr(model, "preprocess_samples"):  # keras-hub's models take texts, too
            batch = model.preprocess_samples(*keras.utils.unpack_x_y_sample_weight(batch))
        model._symbolic_build(data_batch=batch)


def check(model, expected, path):
    """Compares a model and its optimiser with a checkpoint's `description`.

    Raises:
        CheckpointError: where they differ; the message names the checkpoint, what came and what would work.
    """
    found = description(model)
    for part, title in (("model", "model's config"), ("optimizer", "optimizer")):
        if different := _first_difference(found[part], expected[part]):
            name, now, before = different
            raise CheckpointError(
                f"{path} is of another {title}: {name} was {before}, and is {now}. Compile the model of that run to go "
                f"on with it, or choose another `folder` to begin anew."
            )
    for group in found["variables"]:
        check_variables(found["variables"][group], expected["variables"][group], group, path)


def check_variables(found, expected, group, path):
    """Compares two lists of `[path, shape, dtype, trainable]`.

    Raises:
        CheckpointError: as for `check`.
    """
    for now, before in zip(found, expected, strict=False):
        if now != before:
            raise CheckpointError(
                f"{path} is of another {group}: where it has {_say(before)}, this one has {_say(now)}. Build that "
                f"run's model (with its LoRA, dtype and optimizer) to go on with it, or choose another `folder`."
            )
    if len(found) != len(expected):
        raise CheckpointError(
            f"{path} is of another {group}: it has {len(expected)} variables, and this one {len(found)}."
        )


def restore(model, path, content):
    """Puts a checkpoint's weights and optimiser state into a model, into the layout of its variables."""
    _restore_backbone(model, [path])
    _restore_groups(model, [(path, content)], ("model", "optimizer"))


def restore_metrics(model, path, content):
    """Puts a checkpoint's metrics into a model."""
    _restore_groups(model, [(path, content)], ("metrics",))


def restore_weights(model, checkpoints):
    """Puts a checkpoint's weights into a model, compiled or not, and nothing else; of several checkpoints the mean.

    Args:
        model: the model.
        checkpoints: a list of a path and what is no array, each, oldest first.

    Raises:
        CheckpointError: where one is another model's.
    """
    found = [_describe(variable) for variable in model.variables]
    for path, content in checkpoints:
        check_variables(found, content["run"]["variables"]["model"], "model", path)
    _restore_backbone(model, [path for path, _ in checkpoints])
    _restore_groups(model, checkpoints, ("model",))


def write_model(path, content):
    """Writes the weights in a checkpoint's parts, put together tensor by tensor, as the Hugging Face folder in it.

    Args:
        path: of the first process's part; the others' are read beside it.
        content: what is no array of it, with a plain T5Gemma.
    """
    described = content["t5gemma"]
    config = T5GemmaConfig.from_dict(described["config"])
    proto = described["proto"]
    write_checkpoint(
        path / MODEL_FOLDER,
        config,
        arrays.SavedTensors(arrays.SavedArrays(path, content), tensor_specs(config)),
        proto=None if proto is None else base64.b64decode(proto),
        chat=described["chat"],
        allow_non_finite=True,
    )


def random_state():
    """The state of Python's `random`, and of numpy's, Keras's and PyTorch's global generators, JSON-ready."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    generator = global_seed_generator()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "keras": None if generator is None else _copy(generator.state).tolist(),
        "torch": _torch_random_state(),
    }


def set_random_state(state):
    """Sets what `random_state` gave."""
    if state["keras"] is not None:
        keras.random.uniform(())  # makes the generator where there is none yet
        generator = global_seed_generator()
        generator.state.assign(np.array(state["keras"], generator.state.dtype))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, "uint32"), *rest))
    set_torch_random_state(state)


def set_torch_random_state(state):
    """Sets PyTorch's part of what `random_state` gave, where PyTorch is the backend and was."""
    if keras.config.backend() != "torch" or not state["torch"]:
        return
    import torch

    cpu, *devices = (torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for text in state["torch"])
    torch.set_rng_state(cpu)
    if len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)


def _torch_random_state():
    """Of the CPU and of each GPU: Keras's dropout draws from them on PyTorch, whatever its own seed."""
    if keras.config.backend() != "torch":
        return []
    import torch

    return [
        base64.b64encode(state.numpy().tobytes()).decode()
        for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())
    ]


def check_finite(copies, model_arguments):
    """Refuses weights that are no numbers.

    Raises:
        FloatingPointError: the message names a variable.
    """
    for name, array in copies.items():
        if name.startswith("model/") and array.dtype in DTYPES.values():
            _check_finite(name, array)
    if model_arguments is not None:
        source = model_arguments["source"]
        for name in source.names():
            _check_finite(name, source.read(name))


def _check_finite(name, array):
    if not all(is_finite(piece) for piece in (flat_pieces(array) if array.ndim else [array.reshape(1)])):
        raise FloatingPointError(f"The weight {name} holds infinities or NaNs.")


class _Copies(TensorSource):
    """The weights of a backbone as they were, under Hugging Face's names."""

    def __init__(self, backbone):
        live = ModelTensors(backbone)
        self._arrays = {name: np.array(live.read(name), copy=True) for name in live.names()}
        self._title = live.where()

    def names(self):
        """Hugging Face's."""
        return list(self._arrays)

    def shape(self, name):
        """As stored."""
        return self._arrays[name].shape

    def dtype(self, name):
        """The variable's."""
        return self._arrays[name].dtype

    def read(self, name):
        """The copy itself."""
        return self._arrays[name]

    def where(self, name=None):
        """The model, and the tensor's name in it."""
        return self._title if name is None else f"{self._title} ({name})"


def _plain_backbone(model):
    """The model's T5Gemma, where its weights are a Hugging Face T5Gemma's: no LoRA, not quantized. Else None."""
    backbone = getattr(model, "backbone", model)
    config = getattr(backbone, "config", None)
    if not isinstance(config, T5GemmaConfig):
        return None
    plain = {tensor.path for tensor in tensor_specs(config)} == {weight.path for weight in backbone.weights}
    return backbone if plain and len({str(weight.dtype) for weight in backbone.weights}) == 1 else None


def _model_arguments(model, backbone):
    proto, chat = _tokenizer(model)
    return {"config": backbone.config, "source": _Copies(backbone), "proto": proto, "chat": chat}


def _t5gemma(model, backbone):
    """What `write_model` needs besides the weights, JSON-ready."""
    proto, chat = _tokenizer(model)
    proto = None if proto is None else base64.b64encode(proto).decode()
    return {"config": _json(backbone.config.to_dict()), "proto": proto, "chat": chat}


def _tokenizer(model):
    """The SentencePiece model of a model's preprocessor, bytes or None, and whether it reads chats."""
    preprocessor = getattr(model, "preprocessor", None)
    proto = None if preprocessor is None else preprocessor.tokenizer.proto
    proto = proto if isinstance(proto, bytes) else None
    return proto, proto is not None and bool(getattr(preprocessor, "chat", False))


def _restore_backbone(model, paths):
    backbone = _plain_backbone(model)
    if backbone is not None and part_of(paths[0]) is None:
        sources = [CheckpointFolder(path / MODEL_FOLDER) for path in paths]
        load_into(backbone, backbone.config, sources[0] if len(sources) == 1 else MeanTensors(sources))


def _restore_groups(model, checkpoints, groups):
    saved = [arrays.SavedArrays(path, content) for path, content in checkpoints]
    backbone = _plain_backbone(model) if part_of(checkpoints[0][0]) is None else None
    named = _named(model, backbone, groups)
    # By place: in a second model of the same program Keras gives some variables other names.
    for name, *saved_names in zip(sorted(named), *(of_one.names(groups) for of_one in saved), strict=True):
        arrays.put(named[name], arrays.mean(saved, saved_names))


def _named(model, backbone, groups=("model", "optimizer", "metrics")):
    """Every variable that goes among the arrays, by a name that sorts by group and place."""
    elsewhere = set() if backbone is None else {id(variable) for variable in backbone.weights}
    found = {}
    for group in groups:
        # `variables` hold the random state of dropout, too, and the optimizer's everything that it accumulates.
        variables = {
            "model": lambda: model.variables,
            "optimizer": lambda: model.optimizer.variables,
            "metrics": lambda: model.metrics_variables,
        }[group]()
        for place, variable in enumerate(variables):
            if id(variable) not in elsewhere:
                found[f"{group}/{place:06d}/{variable.path}"] = variable
    return found


def _copy(variable):
    array = np.asarray(variable_array(variable))
    # Contiguous, owned, and of the variable's dtype, where the backend gave bfloat16 as float32.
    return np.array(array, dtype=DTYPES["BF16"] if str(variable.dtype) == "bfloat16" else array.dtype, order="C")


def _describe(variable):
    dtype = str(variable.dtype)
    # Backends count in integers of their own; and Keras numbers what has no name by what was built before.
    dtype = "integer" if "int" in dtype else dtype
    path = re.sub(r"_\d+(?=[/_]|$)", "", variable.path)
    return [path, [int(size) for size in variable.shape], dtype, bool(variable.trainable)]


def _say(entry):
    path, shape, dtype, trainable = entry
    return f"{path} {dtype} {shape}" + ("" if trainable else ", not trainable")


def _json(value):
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def _without_names_and_rates(value):
    """A config without names, which Keras numbers, and rates that are numbers: those are variables, and saved."""
    if isinstance(value, dict):
        return {
            name: _without_names_and_rates(item)
            for name, item in value.items()
            if name != "name" and not (name == "learning_rate" and isinstance(item, (int, float)))
        }
    return value


def _first_difference(found, expected, name=""):
    """`(name, found, expected)` of the first place in which two configs differ, or None."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            if different := _first_difference(found.get(key), expected.get(key), f"{name}.{key}" if name else key):
                return different
        return None
    return None if found == expected else (name, found, expected)
