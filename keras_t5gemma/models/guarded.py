"""Keras's methods of a model, made safe for callbacks and threads."""

import functools
from collections.abc import Callable

import keras

from keras_t5gemma.concurrency import changing, reading

_CHANGE = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")
_READ = ("save", "save_weights", "load_weights", "export", "get_weights", "set_weights")


class Guarded:
    """Mixin for a `keras.Model`: its methods work in callbacks and next to other threads; see `concurrency`.

    Each method raises a `RuntimeError` if another thread is in `fit`.
    """

    def save_to_preset(self, preset_dir, **kwargs):
        """Saves the model as a preset in Keras's format, as keras-hub does."""
        with reading(self, "save_to_preset"):
            return super().save_to_preset(preset_dir, **kwargs)


def _guard(name: str, access: Callable) -> None:
    """Overrides one of Keras's methods by itself, run under `access`: `reading` or `changing` of `concurrency`."""
    method = getattr(keras.Model, name)

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if isinstance(kwargs.get("callbacks"), keras.callbacks.Callback):
            # Keras runs a callback that is not in a list in separate threads, while training continues.
            kwargs["callbacks"] = [kwargs["callbacks"]]
        with access(self, name):
            return getattr(super(Guarded, self), name)(*args, **kwargs)

    setattr(Guarded, name, guarded)


for _name in _CHANGE:
    _guard(_name, changing)
for _name in _READ:
    _guard(_name, reading)
