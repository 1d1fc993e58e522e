"""Who may use a model at the same time: many threads may read its weights, and one alone may change them.

    reads      generate, stream, score, embed, saving, exporting
    changes    fit, evaluate, predict and the like: these two change no weight, but on JAX Keras takes the values out of
               the variables while they run

What is known of a model is kept by its backbone, which several models may share. A thread that changes a model may read
it, too: a callback generates in the middle of `fit`.
"""

import collections
import contextlib
import threading
import weakref

from keras_t5gemma._keras_internals import synchronize_training_state


class _Use:
    """What runs on one backbone."""

    def __init__(self):
        self.changed = threading.Condition()
        self.readers = collections.Counter()  # by thread
        self.owner = None  # the thread that changes the model
        self.running = []  # (model, name of the method), the outermost first


_USES = weakref.WeakKeyDictionary()
_USES_LOCK = threading.Lock()


@contextlib.contextmanager
def reading(model, name):
    """While it is, no other thread changes the model's weights; on JAX the variables have their values.

    Args:
        model: a `keras.Model`, a backbone or a model that has one as `backbone`.
        name: what is called, for the error.

    Raises:
        RuntimeError: if another thread trains the model. Of other methods the end is waited for.
    """
    use, thread = _use(model), threading.get_ident()
    with use.changed:
        if thread not in use.readers:
            _wait_for_owner(use, thread, name)
        use.readers[thread] += 1
        models = [outer for outer, _ in use.running] if use.owner == thread else []
    try:
        for outer in models:
            synchronize_training_state(outer)
        yield
    finally:
        with use.changed:
            use.readers[thread] -= 1
            if not use.readers[thread]:
                del use.readers[thread]
            use.changed.notify_all()


@contextlib.contextmanager
def changing(model, name):
    """While it is, this thread alone uses the model; waits for answers that other threads have begun.

    Args:
        model: as for `reading`.
        name: of the method, "fit" for one.

    Raises:
        RuntimeError: as for `reading`.
    """
    use, thread = _use(model), threading.get_ident()
    with use.changed:
        _wait_for_owner(use, thread, name)
        models = [outer for outer, _ in use.running]
        use.owner = thread
        use.running.append((model, name))
        use.changed.wait_for(lambda: not use.readers.keys() - {thread})
    try:
        for outer in models:
            synchronize_training_state(outer)
        yield
    finally:
        with use.changed:
            use.running.pop()
            if not use.running:
                use.owner = None
            use.changed.notify_all()


def _use(model):
    backbone = getattr(model, "backbone", model)
    with _USES_LOCK:
        return _USES.setdefault(backbone, _Use())


def _wait_for_owner(use, thread, name):
    """Waits until no other thread changes the model, unless that takes as long as training may."""
    while use.owner not in (None, thread):
        model, running = use.running[0]
        if running == "fit":
            raise RuntimeError(
                f"`{name}` cannot run while another thread is in `fit` of {model.name!r}: each step changes the "
                f"weights. Call it from a callback of that `fit` (passed in a list: `callbacks=[...]`) or after it, "
                f"or use another model with a copy of the weights."
            )
        use.changed.wait()
