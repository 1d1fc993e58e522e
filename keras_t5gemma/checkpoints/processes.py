"""Multi-process helpers (JAX): rank, agreement between processes, and gathering of sharded tensors."""

import numpy as np

from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource

# Bytes of an error's message that the other processes are told.
_MESSAGE_BYTES = 2_000
# What the first process announces in place of a tensor's number, when it needs no more.
_DONE, _FAILED = -1, -2


def process_count():
    """How many processes compute together: those that `keras.distribution.initialize` brought together, else one."""
    return _jax().process_count() if _on_jax() else 1


def process_index():
    """Which of them this is, from 0."""
    return _jax().process_index() if _on_jax() else 0


def gather(value):
    """Every process's value, numbers of one shape and dtype on all: an array with an axis for the process in front.

    As anything here that all processes do together, it waits for the slowest.
    """
    if process_count() == 1:
        return np.asarray(value)[None]
    return _multihost().process_allgather(np.asarray(value))


def on_all_processes(action):
    """Calls a function, and raises on all processes where it raised on one.

    Without it the others would wait at their next step for a process that has gone.

    Args:
        action: called without arguments.

    Returns:
        What it returned here.

    Raises:
        CheckpointError: where it raised on another process, with its message; here its own error.
    """
    if process_count() == 1:
        return action()
    result = failure = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the others must hear of it
        failure = error
    text = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()[:_MESSAGE_BYTES]
    told = gather(np.frombuffer(text.ljust(_MESSAGE_BYTES, b"\0"), "uint8"))
    if failure is not None:
        raise failure
    for index, letters in enumerate(told):
        if letters.any():
            message = letters.tobytes().rstrip(b"\0").decode(errors="replace")
            raise CheckpointError(f"Process {index} of {process_count()} could not go on: {message}")
    return result


def is_local(tensor):
    """Whether this process holds the only copy of a tensor, or of a variable: no other has a part of it."""
    tensor = getattr(tensor, "value", tensor)
    return not _on_jax() or not isinstance(tensor, _jax().Array) or tensor.is_fully_addressable


def gathered(tensor):
    """A tensor or a variable as numpy; where its parts lie on several processes, all must ask for it at once."""
    import keras

    tensor = getattr(tensor, "value", tensor)
    if is_local(tensor) or tensor.is_fully_replicated:
        return np.asarray(keras.ops.convert_to_numpy(tensor))
    return _multihost().process_allgather(tensor, tiled=True)


def write_on_first(source, tensors, write):
    """Writes a model's tensors; where they lie on several processes, on the first, and the others help it to read.

    The first announces each tensor that it reads, and all gather it: one tensor at a time is whole.

    Args:
        source: a `TensorSource` that reads a model by `gathered`.
        tensors: what it reads, variables or tensors.
        write: called with a source, on one process.

    Raises:
        CheckpointError: where another process is the one that writes, and it failed.
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
    while (place := int(announce(np.array(0, "int32")))) >= 0:
        source.read(names[place])
    if place == _FAILED:
        raise CheckpointError("Process 0 could not write what all processes read for it; its own message says why.")


class _Announced(TensorSource):
    """A source whose reader tells the other processes what it reads."""

    def __init__(self, source, announce):
        self._source, self._announce = source, announce
        self._places = {name: place for place, name in enumerate(source.names())}

    def names(self):
        return self._source.names()

    def shape(self, name):
        return self._source.shape(name)

    def dtype(self, name):
        return self._source.dtype(name)

    def read(self, name):
        self._announce(np.array(self._places[name], "int32"))
        return self._source.read(name)

    def where(self, name=None):
        return self._source.where(name)


def _on_jax():
    import keras

    return keras.config.backend() == "jax"


def _jax():
    import jax

    return jax


def _multihost():
    from jax.experimental import multihost_utils

    return multihost_utils
