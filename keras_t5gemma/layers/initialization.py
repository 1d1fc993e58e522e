"""Initial values of a layer's weights: random draws, or the checkpoint that is being read."""

import contextlib
import contextvars

import keras
from keras import ops

from keras_t5gemma.layers.dense import Dense
from keras_t5gemma.layers.embedding import Embedding

_reader = contextvars.ContextVar("reader", default=None)


@contextlib.contextmanager
def weights_from(read):
    """Layers built inside take their weights from `read(path, shape, dtype)`, a tensor; nothing is drawn at random.

    So a checkpoint's tensor becomes the variable without another of its size ever being in memory.
    """
    token = _reader.set(read)
    try:
        yield
    finally:
        _reader.reset(token)


class FirstValue(keras.initializers.Initializer):
    """The first value of a layer's weights, in the order in which it makes them.

    Args:
        layer: the layer, which may be set later.
        fresh: the `keras.initializers.Initializer` of weights that no checkpoint gives.
        names: the weights' names, e.g. ("kernel",).
    """

    def __init__(self, fresh, *names, layer=None):
        self.fresh = fresh
        self.layer = layer
        self._names = iter(names)

    def __call__(self, shape, dtype=None):
        """A tensor of this shape."""
        read = _reader.get()
        if read is None:
            return self.fresh(shape, dtype=dtype)
        return read(f"{self.layer.path}/{next(self._names)}", tuple(shape), keras.backend.standardize_dtype(dtype))

    def get_config(self):
        """Nothing: it serves one layer once."""
        return {}


def dense(units, name, config, dtype):
    """A `keras.layers.Dense` without bias.

    Its kernel has two axes, so that LoRA is the usual one, Muon and quantization apply, and a checkpoint's matrix is a
    transpose away.

    Args:
        units: width of the output.
        name: the layer's name, which LoRA's targets and checkpoints go by.
        config: the stack's `StackConfig`, for `initializer_range`.
        dtype: the dtype policy.
    """
    first = FirstValue(keras.initializers.RandomNormal(stddev=config.initializer_range), "kernel")
    first.layer = Dense(units, use_bias=False, kernel_initializer=first, dtype=dtype, name=name)
    return first.layer


def as_rows(x):
    """x [B, T, D] as [B * T, D], for a dense layer.

    With three axes the gradient of a kernel is computed example by example on TensorFlow, and at a fraction of the
    speed by XLA on CPUs.
    """
    return ops.reshape(x, (-1, x.shape[-1]))


def embedding(vocabulary_size, name, config, dtype, *, tied):
    """A `keras.layers.ReversibleEmbedding`.

    In `mixed_bfloat16` a tied one looks rows up in the table as it is and casts those: cast first, as Keras's layers do
    by themselves, there would be another table a step, and one more for its gradient. What it gives may be in the
    table's dtype where it is quantized.

    Args:
        vocabulary_size: V.
        name: the layer's name.
        config: the stack's `StackConfig`, for `hidden_dim` and `initializer_range`.
        dtype: the dtype policy.
        tied: whether the reverse is the table itself, or a projection [D, V] of its own.
    """
    fresh = keras.initializers.RandomNormal(stddev=config.initializer_range)
    first = FirstValue(fresh, "embeddings", "reverse_embeddings")
    first.layer = Embedding(
        vocabulary_size,
        config.hidden_dim,
        tie_weights=tied,
        embeddings_initializer=first,
        dtype=dtype,
        name=name,
        autocast=not tied,
    )
    return first.layer
