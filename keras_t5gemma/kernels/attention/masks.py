"""Who may attend to whom: boolean masks from distances and segment ids, whole or a block of queries at a time."""

import dataclasses
import typing

import keras
from keras import ops

from keras_t5gemma.kernels.device import on_cpu

# Attention logits in memory at once, in bytes of float32: some three times as much is in use at a time. With the eight
# heads of Small-Small, up to 2,048 positions of one example are within it. Memory for more grows with the length, not
# with its square. On a CPU, what its caches hold from one step to the next takes half the time.
BLOCK_BYTES = 2**27
BLOCK_BYTES_ON_CPU = 2**23
# Queries that are attended for at once, at least: with fewer, reading the keys would take longer than computing.
SHORTEST_BLOCK = 128


def attention_mask(query_segments, key_segments, *, query_start=0, causal=False, window=None, key_positions=None):
    """Which keys each query may see.

    A padding mask is a segment id: 0 is padding, and a query sees the keys of its own non-zero segment. An ordinary
    mask of ones and zeros is one segment; a row packed from several examples numbers them 1, 2, 3, ... to keep them
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
        query_segments: int [B, T], the queries' segment ids.
        key_segments: int [B, S], the keys'.
        query_start: the first query's position, where the first key's is 0: not 0 only when decoding from a cache.
        causal: a query sees no later key.
        window: a query at `q` sees keys with `|q - k| < window`; `None` for any distance.
        key_positions: int [S], where they are not 0, 1, 2, ...

    Returns:
        bool [B, T, S].
    """
    queries, keys = ops.expand_dims(query_segments, 2), ops.expand_dims(key_segments, 1)
    visible = ops.logical_and(ops.equal(queries, keys), ops.not_equal(keys, 0))
    if not causal and window is None:
        return visible
    query_positions = ops.add(ops.arange(ops.shape(query_segments)[1], dtype="int32"), query_start)
    if key_positions is None:
        key_positions = ops.arange(ops.shape(key_segments)[1], dtype="int32")
    distance = ops.expand_dims(query_positions, 1) - ops.expand_dims(key_positions, 0)
    if causal:
        visible = ops.logical_and(visible, distance >= 0)
    if window is not None:
        visible = ops.logical_and(visible, ops.abs(distance) < window)
    return visible


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """The mask of sequences so long that neither it nor the logits are to exist as a whole.

    Attributes:
        block: t, the length of the blocks in which queries are attended for, where no kernel serves them; a scalar
            tensor if lengths are known only when the program runs.
        query_segments: int [B, T].
        key_segments: int [B, S].
        query_start: as in `attention_mask`, like those that follow.
        causal: whether a query sees no later key.
        window: how far a query sees, or None.
        made: what a kernel makes of it, once for all layers.
    """

    block: int
    query_segments: typing.Any
    key_segments: typing.Any
    query_start: typing.Any = 0
    causal: bool = False
    window: int | None = None
    made: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def run_of_keys(self, index):
        """`(first, length)` of the keys among which are all that block `index` of the queries sees.

        The length is the same for every block: with a window its own and the block's, else S.
        """
        keys = ops.shape(self.key_segments)[1]
        if self.window is None:
            return 0, keys
        length = smallest(self.block + (self.window - 1) * (1 if self.causal else 2), keys)
        if not ops.is_tensor(length) and length == keys:
            return 0, keys
        first = index * self.block + self.query_start - (self.window - 1)
        return smallest(largest(first, 0), keys - length), length

    def of_block(self, index, segments, first, length):
        """Which of `length` keys from `first` on each query of a block may see.

        Args:
            index: which block, an int or a scalar tensor.
            segments: int [B, t], the block's.
            first: the first key.
            length: s.

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


def visible_keys(heads, query_segments, key_segments, *, fused=False, **kind):
    """Which keys each query may see, in the form that attention of this size takes.

    Args:
        heads: N, of which each has logits of its own.
        query_segments: int [B, T], the queries' segment ids.
        key_segments: int [B, S], the keys'.
        fused: whether there is a kernel, for which sequences are long earlier.
        **kind: `query_start`, `causal` and `window` of `attention_mask`.

    Returns:
        bool [B, T, S], or a `BlockMask` for long sequences, and for those that may be: if TensorFlow traces for any
        length, the program itself finds the length of its blocks, of which short sequences have one.
    """
    (batch, queries), keys = query_segments.shape, key_segments.shape[1]
    size = (BLOCK_BYTES_ON_CPU if on_cpu(query_segments) else BLOCK_BYTES) * _devices()
    if queries is None or keys is None:
        return BlockMask(
            _block_of_any(size // (4 * heads), query_segments, key_segments), query_segments, key_segments, **kind
        )
    # An unknown batch counts as one example: its activations, too, need memory per example.
    longest = max(SHORTEST_BLOCK, size // (4 * (batch or 1) * heads * keys))
    if longest < queries or (fused and queries >= SHORTEST_BLOCK):
        blocks = -(-queries // longest)
        return BlockMask(-(-queries // blocks), query_segments, key_segments, **kind)
    return attention_mask(query_segments, key_segments, **kind)


def _block_of_any(logits, query_segments, key_segments):
    """The length of blocks of so many logits at most, a scalar tensor: for lengths that only the program will know."""
    (batch, queries), keys = ops.shape(query_segments), ops.shape(key_segments)[1]
    # Divided one by one: in int32 the product of the sizes could overflow.
    longest = ops.maximum(SHORTEST_BLOCK, logits // largest(keys, 1) // largest(batch, 1))
    blocks = ops.maximum(-(-queries // longest), 1)
    return ops.maximum(-(-queries // blocks), 1)


def smallest(left, right):
    """The smaller of two sizes, each an int or, if it is not known before the program runs, a scalar tensor."""
    return ops.minimum(left, right) if ops.is_tensor(left) or ops.is_tensor(right) else min(left, right)


def largest(left, right):
    """The larger of two sizes, likewise."""
    return ops.maximum(left, right) if ops.is_tensor(left) or ops.is_tensor(right) else max(left, right)


def _devices():
    """How many devices share the work: on JAX, shapes are those of all of them together."""
    distribution = keras.distribution.distribution()
    return 1 if distribution is None else distribution.device_mesh.devices.size
