"""A chunk of a loss over a large vocabulary: how tokens are cut into chunks, and what is computed of one's logits."""

import dataclasses
import typing

import keras
import numpy as np
from keras import ops

from keras_t5gemma.kernels.attention.reference import soft_cap
from keras_t5gemma.kernels.barriers import settled
from keras_t5gemma.kernels.device import on_cpu
from keras_t5gemma.kernels.float16 import finite
from keras_t5gemma.kernels.matmul.xla import columns_times, has_quick_kernel

# Bytes of float32 logits at once: large products are fast, and a few of these are in use at a time. TensorFlow's are no
# slower at half the size. On an accelerator fewer chunks count for more: each reads and writes the table's gradient.
CHUNK_BYTES = {"jax": 2**29, "tensorflow": 2**28, "torch": 2**29, "accelerator": 2**30}


def default_chunk_bytes(x):
    """Bytes of float32 logits that are made at once of hidden states x, on each device."""
    return CHUNK_BYTES[keras.config.backend() if on_cpu(x) else "accelerator"]


@dataclasses.dataclass(frozen=True)
class ChunkSettings:
    """What makes a loss of logits: see `VocabularyCrossEntropy`. Equal ones make the same program."""

    cap: float | None
    z_loss: float
    label_smoothing: float

    def by_token(self, *targets):
        """What of a chunk's targets is an array [m, ...], a row a token: here all of them."""
        return targets

    def of_logits(self, logits, labels, shares, gradients):
        """What a chunk, or some of its tokens, add to the loss, and what the loss asks of their logits.

        Args:
            logits: capped, [m, V].
            labels: [m].
            shares: [m].
            gradients: whether they are wanted.

        Returns:
            `([loss, accuracy], gradients)`: float32 [2]; float32 [m, V], of logits before the cap, or None.
        """
        softmax = Softmax.of(logits)
        sums = _chunk_sums(self, logits, softmax, labels, shares)
        return sums, _logit_gradients(self, logits, softmax, labels, shares) if gradients else None

    def in_place(self, logits, workspace, *targets):
        """Turns raw logits into their gradients, on PyTorch, and returns [loss, accuracy]."""
        from keras_t5gemma.kernels.cross_entropy.torch import to_gradients

        return to_gradients(self, logits, workspace, *targets)


class Chunks:
    """How [B, T, ...] is cut into [C, B * t, ...]: C chunks of t positions, filled up with zeros.

    Along T, so that a batch that is spread over devices stays where it is. If B or T is not known, as when TensorFlow
    traces a step, all tokens are one long row, and t is a power of two: XLA compiles a program per t, and what fills up
    the last chunk costs as much as tokens do.

    Args:
        shape: of the hidden states, (B, T, D).
        vocabulary_size: V.
        chunk_bytes: of float32 logits in a chunk, about.
    """

    def __init__(self, shape, vocabulary_size, chunk_bytes):
        batch, self._length, _ = shape
        self._known = batch is not None and self._length is not None
        self._batch = batch if self._known else 1
        tokens = max(1, chunk_bytes // (4 * vocabulary_size * self._batch))
        if self._known:
            self.count = -(-self._length // tokens)
            tokens = -(-self._length // self.count)
        self.tokens = self._most = tokens

    def cut(self, x):
        """[B, T, ...] as [C, B * t, ...]."""
        rest = tuple(x.shape[2:])
        if not self._known:
            x = ops.reshape(x, (1, -1, *rest))
            self._length = ops.shape(x)[1]
            self.tokens = ops.minimum(self._most, _next_power_of_two(self._length))
            self.count = (self._length + self.tokens - 1) // self.tokens
        fill = ops.zeros((self._batch, self.count * self.tokens - self._length, *rest), x.dtype)
        x = ops.reshape(ops.concatenate([x, fill], axis=1), (self._batch, -1, self.tokens, *rest))
        return ops.reshape(ops.swapaxes(x, 0, 1), (-1, self._batch * self.tokens, *rest))

    def join(self, x, shape):
        """The inverse, of [C, B * t, ...] to `shape`, [B, T, ...]."""
        rest = tuple(x.shape[2:])
        x = ops.swapaxes(ops.reshape(x, (-1, self._batch, self.tokens, *rest)), 0, 1)
        x = ops.reshape(x, (self._batch, -1, *rest))
        return ops.reshape(x[:, : self._length], shape)


def _next_power_of_two(length):
    """The smallest power of two that is not below a length, both scalar tensors."""
    powers = 2 ** np.arange(31, dtype="int32")
    return ops.max(ops.where(powers < 2 * length, powers, 1))


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The parts of a softmax over logits [m, V].

    Attributes:
        largest: of the logits, [m, 1].
        exponentials: of the logits less the largest, [m, V].
        log_sum: `log(sum(exp(logits)))`, [m, 1].
    """

    largest: typing.Any
    exponentials: typing.Any
    log_sum: typing.Any

    @classmethod
    def of(cls, logits):
        """Takes them of logits [m, V]."""
        largest = ops.max(logits, axis=-1, keepdims=True)
        # Settled, since XLA's sum of exponentials that it makes itself takes five times as long on CPUs.
        exponentials = settled(ops.exp(logits - largest))
        return cls(largest, exponentials, largest + ops.log(ops.sum(exponentials, axis=-1, keepdims=True)))

    def times(self, factors):
        """The probabilities [m, V] times factors [m, 1]."""
        return self.exponentials * (factors * ops.exp(self.largest - self.log_sum))


def chunk_targets(targets, i):
    """What `ChunkSettings.by_token` takes: part i of the arrays that are cut, and those that are not."""
    by_token, shared = targets
    return *(array[i] for array in by_token), *shared


def chunk_logits(x, table, cap):
    """Capped logits [m, V] in float32 of x [m, D] and a table [V, D]."""
    return soft_cap(_product("md,vd->mv", x, table), cap)


def hidden_gradient(gradient, table):
    """[m, D] in float32 of logits' gradients [m, V] and a table [V, D]."""
    return _product("mv,vd->md", gradient, table)


def table_gradient(gradient, x):
    """[V, D] in float32 of logits' gradients [m, V] and hidden states [m, D]."""
    return columns_times(gradient, x) if has_quick_kernel(gradient) else _product("mv,md->vd", gradient, x)


def _product(equation, left, right):
    """An einsum in float32 of arrays in the compute dtype."""
    if keras.config.backend() == "jax" and keras.backend.standardize_dtype(left.dtype) == "bfloat16":
        import jax.numpy as jnp

        # Sums that stay in float32 are what XLA has a quick product of bfloat16 for on CPUs: a third of the time.
        return jnp.einsum(equation, left, right, preferred_element_type="float32")
    return ops.cast(finite(ops.einsum(equation, left, right)), "float32")


def before_cap(gradient, logits, cap):
    """A gradient with respect to capped logits as one with respect to the logits before."""
    return gradient if cap is None else gradient * (1 - ops.square(logits / cap))


def _chunk_sums(settings, logits, softmax, labels, shares):
    """[loss, accuracy] of a chunk, weighted by its tokens' shares [m]."""
    log_sum = softmax.log_sum
    picked = ops.take_along_axis(logits, ops.expand_dims(labels, -1), axis=-1)
    losses = log_sum - (1 - settings.label_smoothing) * picked
    if settings.label_smoothing:
        losses = losses - settings.label_smoothing * ops.mean(logits, axis=-1, keepdims=True)
    if settings.z_loss:
        losses = losses + settings.z_loss * ops.square(log_sum)
    correct = ops.cast(picked >= softmax.largest, "float32")
    return ops.sum(ops.expand_dims(shares, -1) * ops.concatenate([losses, correct], axis=-1), axis=0)


def _logit_gradients(settings, logits, softmax, labels, shares):
    """The loss's gradient with respect to a chunk's logits before the cap, [m, V]."""
    shares, labels = ops.expand_dims(shares, -1), ops.expand_dims(labels, -1)
    gradient = softmax.times(shares * (1 + 2 * settings.z_loss * softmax.log_sum))
    if settings.label_smoothing:
        gradient = gradient - shares * (settings.label_smoothing / logits.shape[-1])
    is_label = ops.equal(ops.arange(logits.shape[-1], dtype="int32"), labels)
    gradient = ops.where(is_label, gradient - shares * (1 - settings.label_smoothing), gradient)
    return before_cap(gradient, logits, settings.cap)
