"""Small runs with a `TrainingCheckpoint`, whole or interrupted, and what they end with."""

import gc
import threading

import grain
import keras
import numpy as np
import pytest
from keras import ops

from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint

# On JAX equal to the bit. TensorFlow and PyTorch promise no such thing of two runs, killed or not.
TOLERANCE = 0 if keras.config.backend() == "jax" else 1e-6


def rows(count=64, seed=0, batch=4):
    """`count` rows in batches, shuffled: 64 make 16 batches."""
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype("float32")
    return grain.MapDataset.range(count).shuffle(seed=1).map(lambda i: (x[i], x[i][:2])).batch(batch)


def dense(optimizer="adam", units=8, dtype=None, **kwargs):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(units, dtype=dtype),
        keras.layers.Dropout(0.5, dtype=dtype),
        keras.layers.Dense(2, dtype=dtype),
    ]
    model = keras.Sequential([keras.Input((4,)), *layers])
    # Eagerly, since each of these trains for less time than it would take to compile; killed runs are compiled.
    model.compile(optimizer, "mse", metrics=["mae"], **{"run_eagerly": True, **kwargs})
    return model


def fit(model, folder, dataset=None, callbacks=(), save_every=4, keep=3, **kwargs):
    checkpoint = TrainingCheckpoint(folder, save_every=save_every, keep=keep)
    dataset = checkpoint.data(rows() if dataset is None else dataset)
    arguments = dict(epochs=2, steps_per_epoch=8, verbose=0, shuffle=False) | kwargs
    return model.fit(dataset, callbacks=[*callbacks, checkpoint], **arguments)


def weights(model):
    return [np.array(ops.convert_to_numpy(ops.cast(variable, "float32"))) for variable in model.variables]


def assert_same(model, other):
    for found, expected in zip(weights(model), weights(other), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


class Stop(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    """Ends `fit` by an error after so many batches: what a user's Ctrl-C does."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left < 0:
            raise Stop


def interrupted(folder, batches, make=dense, **kwargs):
    with pytest.raises(Stop):
        fit(make(), folder, callbacks=[Interrupt(batches)], **kwargs)
    wait_for_writers()


def wait_for_writers():
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint"):
            thread.join()
