"""Keras's methods of a model, made safe for callbacks and threads."""

import functools

import keras

from keras_t5gemma.concurrency import changing, reading

_CHANGE = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")
_READ = ("save", "save_weights", "load_weights", "export", "get_weights", "set_weights")


class Guarded:
    """Mixed into a `keras.Model`, whose methods then work in callbacks and beside other threads, see `concurrency`.

    Raises:
        RuntimeError: by each method if another thread is in `fit`.
    """

    def save_to_preset(self, preset_dir, **kwargs):
        """Saves as a preset in Keras's format, as keras-hub does."""
        with reading(self, "save_to_preset"):
            return super().save_to_preset(preset_dir, **kwargs)


def _guard(name, turn):
    method = getattr(keras.Model, name)

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if isinstance(kwargs.get("callbacks"), keras.callbacks.Callback):
            # Not in a list, Keras would run it in threads of its own, while training goes on.
            kwargs["callbacks"] = [kwargs["callbacks"]]
        with turn(self, name):
            return getattr(super(Guarded, self), name)(*args, **kwargs)

    setattr(Guarded, name, guarded)


for _name in _CHANGE:
    _guard(_name, changing)
for _name in _READ:
    _guard(_name, reading)
