"""Locks of a model between threads: many may read its weights at the same time, but only one may change them.

    reads      generate, stream, score, embed, saving, exporting
    changes    fit, evaluate, predict and the like: the last two change no weight, but on JAX Keras takes the values out
               of the variables while they run

Each backbone has one lock, because several models may share a backbone. A thread that changes a model may also read it:
a callback generates in the middle of `fit`.
"""

import collections
import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from keras_t5gemma._keras_internals import synchronize_training_state

if TYPE_CHECKING:
    import keras


# Methods that may take very long, and what of theirs may use the model meanwhile.
_TRAINS = {
    "fit": "a callback of that `fit` (passed in a list: `callbacks=[...]`)",
    "reinforce": "a reward function of that `reinforce`",
}


class _ModelLock:
    """The readers and the writer of one backbone."""

    def __init__(self):
        self.changed = threading.Condition()
        self.readers = collections.Counter()  # thread -> its open calls of `reading`
        self.owner: int | None = None  # the thread that changes the model
        self.running: list[tuple[keras.Model, str]] = []  # (model, name of the method), the outermost first


_LOCKS = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextlib.contextmanager
def reading(model: "keras.Model", name: str) -> Iterator[None]:
    """A context in which no other thread changes the model's weights. On JAX the variables have their values in it.

    Waits until other threads no longer change the model, unless one of them trains it.

    Args:
        model: a `keras.Model`: a backbone, or a model that has one as `backbone`.
        name: the method that reads, for the error.

    Raises:
        RuntimeError: if another thread trains the model.
    """
    lock, thread = _lock_of(model), threading.get_ident()
    with lock.changed:
        if thread not in lock.readers:
            _wait_for_owner(lock, thread, name)
        lock.readers[thread] += 1
        models = [outer for outer, _ in lock.running] if lock.owner == thread else []
    try:
        for outer in models:
            synchronize_training_state(outer)
        yield
    finally:
        with lock.changed:
            lock.readers[thread] -= 1
            if not lock.readers[thread]:
                del lock.readers[thread]
            lock.changed.notify_all()


@contextlib.contextmanager
def changing(model: "keras.Model", name: str) -> Iterator[None]:
    """A context in which only this thread uses the model.

    Waits until other threads no longer read or change the model, unless one of them trains it.

    Args:
        model: as for `reading`.
        name: the method that changes the model, e.g. "fit".

    Raises:
        RuntimeError: if another thread trains the model.
    """
    lock, thread = _lock_of(model), threading.get_ident()
    with lock.changed:
        _wait_for_owner(lock, thread, name)
        models = [outer for outer, _ in lock.running]
        lock.owner = thread
        lock.running.append((model, name))
        lock.changed.wait_for(lambda: not lock.readers.keys() - {thread})
    try:
        for outer in models:
            synchronize_training_state(outer)
        yield
    finally:
        with lock.changed:
            lock.running.pop()
            if not lock.running:
                lock.owner = None
            lock.changed.notify_all()


def _lock_of(model: "keras.Model") -> _ModelLock:
    backbone = getattr(model, "backbone", model)
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(backbone, _ModelLock())


def _wait_for_owner(lock: _ModelLock, thread: int, name: str) -> None:
    """Waits until no other thread changes the model. Raises if the other thread trains, which may take very long."""
    while lock.owner not in (None, thread):
        model, running = lock.running[0]
        if running in _TRAINS:
            raise RuntimeError(
                f"`{name}` cannot run while another thread is in `{running}` of {model.name!r}: each step changes the "
                f"weights. Call it from {_TRAINS[running]} or after it, or use another model with a copy of the "
                f"weights."
            )
        lock.changed.wait()
