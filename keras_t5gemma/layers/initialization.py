"""Initial values of a layer's weights: random numbers, or the checkpoint that is being read."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import keras
from keras import ops

from keras_t5gemma.config import StackConfig
from keras_t5gemma.layers.dense import Dense
from keras_t5gemma.layers.embedding import Embedding

_reader = contextvars.ContextVar("reader", default=None)


@contextlib.contextmanager
def weights_from(read: Callable) -> Iterator[None]:
    """A context in which layers take their initial weights from a checkpoint instead of random numbers.

    So a checkpoint's tensor becomes the variable, and no second tensor of its size is ever in memory.

    Args:
        read: `(path, shape, dtype) -> tensor`, called for each weight when its layer is built.
    """
    token = _reader.set(read)
    try:
        yield
    finally:
        _reader.reset(token)


class FirstValue(keras.initializers.Initializer):
    """Initializes one layer's weights, from the checkpoint of `weights_from` or else by another initializer.

    Args:
        fallback: the `keras.initializers.Initializer` outside of `weights_from`.
        *names: the weights' names in the order in which the layer creates them, e.g. "kernel".
        layer: the layer; may be set later.
    """

    def __init__(self, fallback: keras.initializers.Initializer, *names: str, layer: keras.layers.Layer | None = None):
        self.fallback = fallback
        self.layer = layer
        self._names = iter(names)

    def __call__(self, shape, dtype=None):
        """The initial value of the layer's next weight, a tensor of this shape."""
        read = _reader.get()
        if read is None:
            return self.fallback(shape, dtype=dtype)
        return read(f"{self.layer.path}/{next(self._names)}", tuple(shape), keras.backend.standardize_dtype(dtype))

    def get_config(self) -> dict:
        """An empty config: an instance serves one layer once and is never restored."""
        return {}


def dense(units: int, name: str, config: StackConfig, dtype: keras.DTypePolicy) -> Dense:
    """Creates a `keras.layers.Dense` without bias.

    Its kernel has two axes. So LoRA is the usual LoRA, Muon and quantization apply, and a checkpoint's matrix is its
    transpose.

    Args:
        units: width of the output.
        name: the layer's name. LoRA's targets and checkpoints refer to it.
        config: the stack's `StackConfig`, for `initializer_range`.
        dtype: the dtype policy.

    Returns:
        The layer, not built.
    """
    first = FirstValue(keras.initializers.RandomNormal(stddev=config.initializer_range), "kernel")
    first.layer = Dense(units, use_bias=False, kernel_initializer=first, dtype=dtype, name=name)
    return first.layer


def as_rows(x):
    """Reshapes x [B, T, D] to [B * T, D], for a dense layer.

    With three axes, TensorFlow computes the gradient of a kernel example by example. XLA on CPUs computes it at a
    fraction of the speed.
    """
    return ops.reshape(x, (-1, x.shape[-1]))


def embedding(
    vocabulary_size: int, name: str, config: StackConfig, dtype: keras.DTypePolicy, *, tied: bool
) -> Embedding:
    """Creates a `keras.layers.ReversibleEmbedding`.

    In `mixed_bfloat16` a tied table is looked up in its own dtype, and only the rows are cast. Keras's layers cast the
    table first, which would allocate a second table per step, and a third one for its gradient. A quantized layer may
    return rows in the table's dtype.

    Args:
        vocabulary_size: V.
        name: the layer's name.
        config: the stack's `StackConfig`, for `hidden_dim` and `initializer_range`.
        dtype: the dtype policy.
        tied: whether the output projection is the table itself, rather than a separate matrix [D, V].

    Returns:
        The layer, not built.
    """
    normal = keras.initializers.RandomNormal(stddev=config.initializer_range)
    first = FirstValue(normal, "embeddings", "reverse_embeddings")
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
