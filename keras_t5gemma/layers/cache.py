"""The key and value cache of decoding: one slot per position, or a ring of slots for a shorter window.

A ring of six slots after position 7 was written:

    slot       0 1 2 3 4 5
    position   6 7 2 3 4 5        with a window of 4, the query at 7 sees 4, 5, 6 and 7

A ring has more slots than the window if several positions are written at once. Some of these may be written too early,
and again later. The additional slots ensure that they overwrite no position that is still visible.
"""

from keras import ops

from keras_t5gemma.kernels.cache_update import is_per_row, write_at


def cache_slots(length: int, window: int | None, ahead: int) -> int:
    """R, the number of slots of a layer's cache.

    Args:
        length: L, the longest sequence.
        window: the layer's sliding window, or None.
        ahead: the most positions that are written at once; L if unknown.

    Returns:
        L, or `window + ahead` if that is smaller.
    """
    return length if window is None else min(length, window + ahead)


def positions(slots, last):
    """The position in each slot if `last` is the newest position: int [R], below 0 for empty slots.

    With a newest position per row, int [B], the result is [B, R].
    """
    last = ops.expand_dims(last, 1) if is_per_row(last) else last
    return last - _mod(last - ops.arange(slots, dtype="int32"), slots)


def is_start(index) -> bool:
    """Whether a position is statically known to be the first."""
    return isinstance(index, int) and index == 0


def slot_of(index, slots):
    """The slot of a position, or of a position per row, in a cache with this many slots; the same in all layers."""
    return index if isinstance(index, int) and index < slots else _mod(index, slots)


def write(buffer, update, index):
    """Writes keys or values into their slots of a cache.

    Args:
        buffer: the cache's keys or values, [B, K, R, H].
        update: the new ones, [B, K, T, H].
        index: position of the first new one. For a single one: its slot, or a slot per row, int [B].

    Returns:
        The updated buffer. On PyTorch, `buffer` itself may be overwritten.
    """
    size, count = buffer.shape[2], update.shape[2]
    if count == 1 or (isinstance(index, int) and index + count <= size):
        return write_at(buffer, update, index, axis=2)
    slot_positions = positions(size, index + count - 1)
    new = ops.take(update, ops.maximum(slot_positions - index, 0), axis=2)
    return ops.where(ops.reshape(slot_positions >= index, (1, 1, size, 1)), new, buffer)


def _mod(index, slots):
    # As a tensor: if `floatx` is bfloat16, Keras on JAX converts a plain integer to float32.
    return ops.mod(index, ops.convert_to_tensor(slots, "int32"))
