"""Cuts the tokens of a batch into chunks, so that the logits of all tokens are never in memory."""

import keras
import numpy as np
from keras import ops

from keras_t5gemma.kernels.device import on_cpu

# Bytes of float32 logits per chunk. Large products are fast, and a few arrays of this size are in use at a time.
# TensorFlow is equally fast at half the size. On an accelerator fewer chunks matter more: each chunk reads and writes
# the table's gradient.
CHUNK_BYTES = {"jax": 2**29, "tensorflow": 2**28, "torch": 2**29, "accelerator": 2**30}


def default_chunk_bytes(x) -> int:
    """Bytes of float32 logits per chunk of hidden states x, on each device."""
    return CHUNK_BYTES[keras.config.backend() if on_cpu(x) else "accelerator"]


class TokenChunks:
    """Cuts [B, T, ...] into [C, B * t, ...]: C chunks of t positions, padded with zeros.

    The cut is along T, so that a batch that is spread over devices stays there. If B or T is unknown, as when
    TensorFlow traces a step, all tokens are one long row, and t is a power of two. XLA compiles one program per t, and
    the padding of the last chunk costs as much as tokens do.

    Args:
        shape: shape of the hidden states, (B, T, D).
        vocabulary_size: V.
        chunk_bytes: approximate bytes of float32 logits per chunk.

    Attributes:
        count: C, the number of chunks.
        tokens: t, the positions per chunk.
    """

    def __init__(self, shape, vocabulary_size: int, chunk_bytes: int):
        batch, self._length, _ = shape
        self._is_static = batch is not None and self._length is not None
        self._batch = batch if self._is_static else 1
        tokens = max(1, chunk_bytes // (4 * vocabulary_size * self._batch))
        if self._is_static:
            self.count = -(-self._length // tokens)
            tokens = -(-self._length // self.count)
        self.tokens = self._max_tokens = tokens

    def cut(self, x):
        """Cuts [B, T, ...] into [C, B * t, ...]."""
        trailing = tuple(x.shape[2:])
        if not self._is_static:
            x = ops.reshape(x, (1, -1, *trailing))
            self._length = ops.shape(x)[1]
            self.tokens = ops.minimum(self._max_tokens, _next_power_of_two(self._length))
            self.count = (self._length + self.tokens - 1) // self.tokens
        fill = ops.zeros((self._batch, self.count * self.tokens - self._length, *trailing), x.dtype)
        x = ops.reshape(ops.concatenate([x, fill], axis=1), (self._batch, -1, self.tokens, *trailing))
        return ops.reshape(ops.swapaxes(x, 0, 1), (-1, self._batch * self.tokens, *trailing))

    def join(self, x, shape):
        """The inverse of `cut`: [C, B * t, ...] to `shape`, [B, T, ...]."""
        trailing = tuple(x.shape[2:])
        x = ops.swapaxes(ops.reshape(x, (-1, self._batch, self.tokens, *trailing)), 0, 1)
        x = ops.reshape(x, (self._batch, -1, *trailing))
        return ops.reshape(x[:, : self._length], shape)


def _next_power_of_two(length):
    """The smallest power of two that is at least a length; both are scalar tensors."""
    powers = 2 ** np.arange(31, dtype="int32")
    return ops.max(ops.where(powers < 2 * length, powers, 1))


def chunk_targets(targets, i):
    """The arguments of `CrossEntropy.by_token` for chunk i.

    Args:
        targets: `(by_token, shared)`: arrays that are cut into chunks, [C, m, ...], and arrays shared by all chunks.
        i: the chunk's index.

    Returns:
        Part i of each array in `by_token`, followed by the arrays in `shared`.
    """
    by_token, shared = targets
    return *(array[i] for array in by_token), *shared
