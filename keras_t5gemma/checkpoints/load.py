"""Tensors into a model's variables; every tensor and every variable is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import keras
import numpy as np

from keras_t5gemma.checkpoints.checks import check_source
from keras_t5gemma.checkpoints.tensor_source import DTYPES, TensorSource, check_finite
from keras_t5gemma.checkpoints.tensor_table import TensorSpec, tensor_specs
from keras_t5gemma.checkpoints.to_device import to_tensor
from keras_t5gemma.config import T5GemmaConfig, T5GemmaEncoderConfig
from keras_t5gemma.layers.initialization import weights_from

Model = TypeVar("Model", bound=keras.layers.Layer)


def load(
    make: Callable[[], Model],
    config: T5GemmaConfig | T5GemmaEncoderConfig,
    source: TensorSource,
    *,
    allow_non_finite: bool = False,
) -> Model:
    """Builds a model with a checkpoint's weights: a variable is created from its tensor when its layer is built.

    Nothing is drawn at random, and only the tensor being read is in memory twice. Under a `keras.distribution`
    variables start as zeros in their layout, and each tensor is copied there from the host's memory.

    Args:
        make: a function that builds the model, e.g. a `T5GemmaBackbone` or a model with the same `weights`; called
            once.
        config: the model's `T5GemmaConfig` or `T5GemmaEncoderConfig`.
        source: a `TensorSource` under the names of Hugging Face's T5Gemma, e.g. a `CheckpointFolder`.
        allow_non_finite: whether tensors may hold infinities and NaNs.

    Returns:
        The model.

    Raises:
        CheckpointError: if a tensor is missing, superfluous, of another shape, not of a floating-point dtype, or not
            finite.
        ValueError: if the model's variables are not those of `config`.
    """
    check_source(config, source)
    expected = {tensor.path: tensor for tensor in tensor_specs(config)}
    distributed = keras.distribution.distribution() is not None

    def read(path: str, shape: tuple[int, ...], dtype: str):
        if distributed:
            return keras.ops.zeros(shape, dtype)
        tensor = expected.get(path)
        if tensor is None or tensor.shape != shape:
            raise ValueError(f"The model is not that of the config: it has {path} of shape {shape}.")
        return to_tensor(_read_as(source, tensor, dtype, allow_non_finite))

    with weights_from(read):
        model = make()
    if distributed:
        load_into(model, config, source, allow_non_finite=allow_non_finite)
    else:
        _match_variables(plain_variables(model), expected.values())
    return model


def load_into(
    model: keras.layers.Layer,
    config: T5GemmaConfig | T5GemmaEncoderConfig,
    source: TensorSource,
    *,
    allow_non_finite: bool = False,
) -> list[str]:
    """Assigns every tensor of a T5Gemma to its variable in an existing model.

    Everything is compared before anything is assigned: each tensor of the source is used or known to be redundant, each
    variable gets exactly one tensor, and all shapes and dtypes fit.

    Args:
        model: a `T5GemmaBackbone`, or a model with the same `weights`, neither quantized nor with LoRA.
        config: as for `load`.
        source: as for `load`.
        allow_non_finite: as for `load`.

    Returns:
        The names of the tensors that were ignored as redundant: the output projection if it is tied, and RoPE's
        frequencies.

    Raises:
        CheckpointError, ValueError: as for `load`.
    """
    variables = plain_variables(model)
    ignored = check_source(config, source)
    expected = tensor_specs(config)
    _match_variables(variables, expected)
    for tensor in expected:
        variable = variables[tensor.path]
        variable.assign(to_tensor(_read_as(source, tensor, variable.dtype, allow_non_finite), variable))
    return ignored


def _read_as(source: TensorSource, tensor: TensorSpec, dtype: str, allow_non_finite: bool) -> np.ndarray:
    """Reads one tensor into an array of our layout and of the given dtype, casting piece by piece."""
    target = DTYPES["BF16"] if dtype == "bfloat16" else np.dtype(dtype)
    stored = _aligned(tensor.stored_shape, target)
    flat, start = stored.reshape(-1), 0
    for piece in source.chunks(tensor.name):
        if not allow_non_finite:
            check_finite(source, tensor.name, piece)
        flat[start : start + piece.size] = piece
        start += piece.size
    if not tensor.row.transposed:
        return stored
    array = _aligned(tensor.shape, target)
    # In blocks that fit in a processor's cache: several times as fast as one transposition.
    for begin in range(0, len(stored), _BLOCK):
        array[:, begin : begin + _BLOCK] = tensor.from_stored(stored[begin : begin + _BLOCK])
    return array


_BLOCK = 64
_ALIGNMENT = 64  # bytes; JAX and TensorFlow copy an array whose memory is aligned less


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new, uninitialized array whose memory is aligned."""
    size = int(np.prod(shape, dtype="int64")) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, "uint8")
    begin = -buffer.ctypes.data % _ALIGNMENT
    return buffer[begin : begin + size].view(dtype).reshape(shape)


def plain_variables(model: keras.layers.Layer) -> dict[str, keras.Variable]:
    """The weights by path of a model that is not quantized and has no LoRA.

    Raises:
        ValueError: if the model is quantized or has LoRA; the message names a variable and the remedy.
    """
    # `weights` are the `variables` except the random state of dropout, which no checkpoint holds.
    variables = {variable.path: variable for variable in model.weights}
    for path, variable in variables.items():
        if "lora_" in path.rsplit("/", 1)[-1]:
            raise ValueError(f"The model has LoRA weights ({path}). Load the checkpoint first, then `enable_lora`.")
        if path.endswith("_scale") or str(variable.dtype) not in map(str, DTYPES.values()):
            raise ValueError(
                f"The model is quantized ({path} is {variable.dtype}). Load the checkpoint into a floating-point "
                f"model, then `quantize`."
            )
    return variables


def _match_variables(variables: Mapping[str, keras.Variable], expected: Collection[TensorSpec]) -> None:
    """Checks that a model has exactly the expected variables, in their shapes."""
    paths = {tensor.path for tensor in expected}
    if different := sorted(paths ^ variables.keys()):
        side = "does not have" if different[0] in paths else "also has"
        raise ValueError(f"The model is not that of the config: it {side} the variable {different[0]}.")
    for tensor in expected:
        if tuple(variables[tensor.path].shape) != tensor.shape:
            raise ValueError(
                f"The model is not that of the config: {tensor.path} has shape {tuple(variables[tensor.path].shape)}. "
                f"Expected {tensor.shape}."
            )
