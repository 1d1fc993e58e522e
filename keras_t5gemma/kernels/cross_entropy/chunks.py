"""How the tokens of a batch are cut into chunks, so that logits of all of them are never in memory."""

import keras
import numpy as np
from keras import ops

from keras_t5gemma.kernels.device import on_cpu

# Bytes of float32 logits at once: large products are fast, and a few of these are in use at a time. TensorFlow's are no
# slower at half the size. On an accelerator fewer chunks count for more: each reads and writes the table's gradient.
CHUNK_BYTES = {"jax": 2**29, "tensorflow": 2**28, "torch": 2**29, "accelerator": 2**30}


def default_chunk_bytes(x):
    """Bytes of float32 logits that are made at once of hidden states x, on each device."""
    return CHUNK_BYTES[keras.config.backend() if on_cpu(x) else "accelerator"]


class TokenChunks:
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


def chunk_targets(targets, i):
    """What `CrossEntropy.by_token` takes: part i of the arrays that are cut, and those that are not."""
    by_token, shared = targets
    return *(array[i] for array in by_token), *shared
