"""Attention masks: the keys that each query may see, from distances and segment ids.

A mask is a boolean tensor, or a `BlockMask` that gives the mask of one block of queries at a time.
"""

import dataclasses
import typing

import keras
from keras import ops

from keras_t5gemma.kernels.cache_update import is_per_row
from keras_t5gemma.kernels.device import on_cpu

# Attention logits in memory at once, in bytes of float32. About three times as much is in use at a time. With the eight
# heads of Small-Small, up to 2,048 positions of one example are within the limit. Beyond it, memory grows with the
# length, not with its square. On a CPU, logits that stay in the caches between steps take half the time.
BLOCK_BYTES = 2**27
BLOCK_BYTES_ON_CPU = 2**23
# The fewest queries per block. With fewer, reading the keys would take longer than computing.
SHORTEST_BLOCK = 128


def attention_mask(query_segments, key_segments, *, query_start=0, causal=False, window=None, key_positions=None):
    """The mask of the keys that each query may see.

    A padding mask is a segment id: 0 is padding, and a query sees the keys of its own non-zero segment. An ordinary
    mask of ones and zeros is one segment. A row packed from several examples numbers them 1, 2, 3, ... to keep them
    apart.

    Six positions, the last one padding, window 3. Rows are queries, columns keys, `x` is visible:

        segments 1 1 1 1 1 0     causal            causal, window 3    window 3
                 x x x x x .     x . . . . .       x . . . . .         x x x . . .
                 x x x x x .     x x . . . .       x x . . . .         x x x x . .
                 x x x x x .     x x x . . .       x x x . . .         x x x x x .
                 x x x x x .     x x x x . .       . x x x . .         . x x x x .
                 x x x x x .     x x x x x .       . . x x x .         . . x x x .
                 . . . . . .     . . . . . .       . . . . . .         . . . . . .

    Args:
        query_segments: int [B, T], segment ids of the queries.
        key_segments: int [B, S], segment ids of the keys.
        query_start: position of the first query, counted from the first key, or one per row, int [B]. It is 0 except in
            cached decoding.
        causal: whether later keys are hidden.
        window: a query at `q` sees keys with `|q - k| < window`; None for any distance.
        key_positions: int [S] or [B, S], if they are not 0, 1, 2, ...

    Returns:
        bool [B, T, S].
    """
    queries, keys = ops.expand_dims(query_segments, 2), ops.expand_dims(key_segments, 1)
    visible = ops.logical_and(ops.equal(queries, keys), ops.not_equal(keys, 0))
    if not causal and window is None:
        return visible
    query_start = ops.expand_dims(query_start, 1) if is_per_row(query_start) else query_start
    query_positions = ops.add(ops.arange(ops.shape(query_segments)[1], dtype="int32"), query_start)
    if key_positions is None:
        key_positions = ops.arange(ops.shape(key_segments)[1], dtype="int32")
    distance = ops.expand_dims(query_positions, -1) - ops.expand_dims(key_positions, -2)
    if causal:
        visible = ops.logical_and(visible, distance >= 0)
    if window is not None:
        visible = ops.logical_and(visible, ops.abs(distance) < window)
    return visible


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """The mask of long sequences, of which neither the mask nor the logits are ever stored as a whole.

    Attributes:
        block: t, queries per block if no kernel serves the mask. A scalar tensor if lengths are known only when the
            program runs.
        query_segments: int [B, T], segment ids of the queries.
        key_segments: int [B, S], segment ids of the keys.
        query_start: position of the first query, counted from the first key.
        causal: whether later keys are hidden.
        window: the distance from which on keys are hidden, or None.
        kernel_masks: the kernels' own forms of this mask, each built once for all layers.
    """

    block: int
    query_segments: typing.Any
    key_segments: typing.Any
    query_start: typing.Any = 0
    causal: bool = False
    window: int | None = None
    kernel_masks: dict[str, typing.Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def key_range(self, index):
        """The range of keys that contains every key that block `index` of the queries sees.

        Returns:
            `(first, length)`. The length is the same for every block. With a window it is the window's length plus the
            block's; otherwise it is S.
        """
        keys = ops.shape(self.key_segments)[1]
        if self.window is None:
            return 0, keys
        length = smallest(self.block + (self.window - 1) * (1 if self.causal else 2), keys)
        if not ops.is_tensor(length) and length == keys:
            return 0, keys
        first = index * self.block + self.query_start - (self.window - 1)
        return smallest(largest(first, 0), keys - length), length

    def block_visible(self, index, segments, first, length):
        """The mask of one block of queries and a range of keys.

        Args:
            index: the block's index, an int or a scalar tensor.
            segments: int [B, t], segment ids of the block's queries.
            first: the first key.
            length: s, the number of keys.

        Returns:
            bool [B, t, s].
        """
        return attention_mask(
            segments,
            ops.slice(self.key_segments, (0, first), (ops.shape(segments)[0], length)),
            query_start=index * self.block + self.query_start - first,
            causal=self.causal,
            window=self.window,
        )


def visible_keys(heads: int, query_segments, key_segments, *, fused: bool = False, **kind):
    """The mask of the keys that each query may see, in the form that suits the lengths.

    Args:
        heads: N, the number of query heads. Each has its own logits.
        query_segments: int [B, T], segment ids of the queries.
        key_segments: int [B, S], segment ids of the keys.
        fused: whether the machine has a kernel. Shorter sequences then count as long.
        **kind: `query_start`, `causal` and `window` of `attention_mask`.

    Returns:
        bool [B, T, S], or a `BlockMask` for long sequences. If TensorFlow traces for any length, it is a `BlockMask`
        too: the program itself computes the length of its blocks, and short sequences have one block.
    """
    (batch, queries), keys = query_segments.shape, key_segments.shape[1]
    size = (BLOCK_BYTES_ON_CPU if on_cpu(query_segments) else BLOCK_BYTES) * _devices()
    if queries is None or keys is None:
        block = _dynamic_block_length(size // (4 * heads), query_segments, key_segments)
        return BlockMask(block, query_segments, key_segments, **kind)
    # An unknown batch, which JAX has in exported programs too, counts as one example: its activations need memory per
    # example too.
    batch = batch if isinstance(batch, int) else 1
    longest = max(SHORTEST_BLOCK, size // (4 * (batch or 1) * heads * keys))
    if longest < queries or (fused and queries >= SHORTEST_BLOCK):
        blocks = -(-queries // longest)
        return BlockMask(-(-queries // blocks), query_segments, key_segments, **kind)
    return attention_mask(query_segments, key_segments, **kind)


def _dynamic_block_length(logits: int, query_segments, key_segments):
    """The length of blocks with at most `logits` logits per head, a scalar tensor, for lengths known at run time."""
    (batch, queries), keys = ops.shape(query_segments), ops.shape(key_segments)[1]
    # Two divisions: in int32 the product of the sizes could overflow.
    longest = ops.maximum(SHORTEST_BLOCK, logits // largest(keys, 1) // largest(batch, 1))
    blocks = ops.maximum(-(-queries // longest), 1)
    return ops.maximum(-(-queries // blocks), 1)


def smallest(left, right):
    """The smaller of two sizes. Each is an int, or a scalar tensor if it is known only when the program runs."""
    return ops.minimum(left, right) if ops.is_tensor(left) or ops.is_tensor(right) else min(left, right)


def largest(left, right):
    """The larger of two sizes. Each is an int, or a scalar tensor if it is known only when the program runs."""
    return ops.maximum(left, right) if ops.is_tensor(left) or ops.is_tensor(right) else max(left, right)


def _devices() -> int:
    """The number of devices that share the work: on JAX, shapes are those of all devices together."""
    distribution = keras.distribution.distribution()
    return 1 if distribution is None else distribution.device_mesh.devices.size
