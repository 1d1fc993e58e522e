"""Multi-process helpers: rank, agreement between processes, and gathering of sharded tensors.

On JAX, processes are connected by `keras.distribution.initialize`, and a tensor may be cut in shards over them. On
PyTorch they are those of `torch.distributed`, and each has all tensors whole. On TensorFlow there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike

from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource

# Bytes of an error's message that are sent to the other processes.
_MESSAGE_BYTES = 2_000
# The first process announces these in place of a tensor's number when it reads no more tensors.
_DONE, _FAILED = -1, -2

Result = TypeVar("Result")


def process_count() -> int:
    """The number of processes that compute together: those that are connected, else one."""
    if _on_jax():
        return _jax().process_count()
    group = _torch_group()
    return 1 if group is None else group.get_world_size()


def process_index() -> int:
    """The rank of this process, from 0."""
    if _on_jax():
        return _jax().process_index()
    group = _torch_group()
    return 0 if group is None else group.get_rank()


def gather(value: ArrayLike) -> np.ndarray:
    """Gathers a value of every process: numbers that have one shape and dtype on all processes.

    Like every collective call here, it waits for the slowest process.

    Args:
        value: a number, or an array [...].

    Returns:
        A numpy array [processes, ...].
    """
    if process_count() == 1:
        return np.asarray(value)[None]
    if _on_jax():
        return _multihost().process_allgather(np.asarray(value))
    return _gathered_by_torch(np.asarray(value))


def on_all_processes(action: Callable[[], Result]) -> Result:
    """Calls a function on all processes; an error on one process is raised on all of them.

    Otherwise the other processes would wait at their next step for a process that has ended.

    Args:
        action: a function without arguments.

    Returns:
        The function's result on this process.

    Raises:
        CheckpointError: if the function raised an error on another process; it has that error's message. An error of
            this process is raised unchanged.
    """
    if process_count() == 1:
        return action()
    result: Result | None = None
    failure = None
    try:
        result = action()
    except Exception as error:  # Of any type: the other processes must learn of it.
        failure = error
    text = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()[:_MESSAGE_BYTES]
    messages = gather(np.frombuffer(text.ljust(_MESSAGE_BYTES, b"\0"), "uint8"))
    if failure is not None:
        raise failure
    for index, letters in enumerate(messages):
        if letters.any():
            message = letters.tobytes().rstrip(b"\0").decode(errors="replace")
            raise CheckpointError(f"Process {index} of {process_count()} could not go on: {message}")
    return cast(Result, result)


def is_local(tensor) -> bool:
    """Whether a tensor or variable lies on this process alone: no other process holds a part of it."""
    tensor = getattr(tensor, "value", tensor)
    return not _on_jax() or not isinstance(tensor, _jax().Array) or tensor.is_fully_addressable


def gathered(tensor) -> np.ndarray:
    """A tensor or variable as a numpy array. If it is sharded over processes, all of them must call this together."""
    import keras

    tensor = getattr(tensor, "value", tensor)
    if is_local(tensor) or tensor.is_fully_replicated:
        return np.asarray(keras.ops.convert_to_numpy(tensor))
    return _multihost().process_allgather(tensor, tiled=True)


def write_on_first(source: TensorSource, tensors: Iterable, write: Callable[[TensorSource], None]) -> None:
    """Writes a model's tensors. If they are sharded over processes, the first process writes and all of them read.

    The first process announces each tensor that it reads, and all processes gather it. So only one tensor at a time is
    whole in memory.

    Args:
        source: a `TensorSource` that reads a model by `gathered`.
        tensors: the variables or tensors that the source reads.
        write: a function that takes a source and writes it; called on one process.

    Raises:
        CheckpointError: on the other processes, if the first process failed to write.
    """
    if all(map(is_local, tensors)):
        write(source)
        return
    announce = _multihost().broadcast_one_to_all
    if process_index() == 0:
        outcome = _FAILED
        try:
            write(_Announced(source, announce))
            outcome = _DONE
        finally:
            announce(np.array(outcome, "int32"))
        return
    names = source.names()
    while (number := int(announce(np.array(0, "int32")))) >= 0:
        source.read(names[number])
    if number == _FAILED:
        raise CheckpointError("Process 0 could not write the tensors; its own message says why.")


class _Announced(TensorSource):
    """A source that announces to the other processes each tensor that it reads."""

    def __init__(self, source: TensorSource, announce: Callable[[np.ndarray], np.ndarray]):
        self._source, self._announce = source, announce
        self._numbers = {name: number for number, name in enumerate(source.names())}

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype(name)

    def read(self, name: str) -> np.ndarray:
        self._announce(np.array(self._numbers[name], "int32"))
        return self._source.read(name)

    def where(self, name: str | None = None) -> str:
        return self._source.where(name)


def _on_jax() -> bool:
    import keras

    return keras.config.backend() == "jax"


def _torch_group() -> ModuleType | None:
    """`torch.distributed`, if the backend is PyTorch and its processes are connected."""
    import keras

    if keras.config.backend() != "torch":
        return None
    from torch import distributed

    return distributed if distributed.is_available() and distributed.is_initialized() else None


def _gathered_by_torch(value: np.ndarray) -> np.ndarray:
    """`gather` on PyTorch: as bytes, since its groups do not take all dtypes."""
    import torch
    from torch import distributed

    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    sent = torch.tensor(list(value.tobytes()), dtype=torch.uint8, device=device)
    received = [torch.empty_like(sent) for _ in range(distributed.get_world_size())]
    distributed.all_gather(received, sent)
    return np.stack([np.frombuffer(x.cpu().numpy().tobytes(), value.dtype).reshape(value.shape) for x in received])


def _jax():
    import jax

    return jax


def _multihost():
    from jax.experimental import multihost_utils

    return multihost_utils
