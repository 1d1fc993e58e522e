"""The keys and values that decoding keeps: one slot per position, or a ring of slots for a shorter window.

A ring of six places after position 7 was written:

    place      0 1 2 3 4 5
    position   6 7 2 3 4 5        with a window of 4, the query at 7 sees 4, 5, 6 and 7

A ring may have more places than the window: as many as positions are written at once beyond those that are to stay, so
that what is written too far, and again later, takes the place of nothing that is still seen.
"""

from keras import ops

from keras_t5gemma.kernels.cache_update import write_at


def cache_slots(length, window, ahead):
    """R, the places of a layer's cache.

    Args:
        length: L, the longest sequence.
        window: of the layer, or None.
        ahead: the most positions that are written at once; L where not known.
    """
    return length if window is None else min(length, window + ahead)


def positions(places, last):
    """int [R]: the position in each place when `last` is the newest; below 0 where there is none yet."""
    return last - _mod(last - ops.arange(places, dtype="int32"), places)


def is_start(index):
    """Whether a position is known to be the first, before anything runs."""
    return isinstance(index, int) and index == 0


def slot_of(index, places):
    """The place of a position; one for all layers of a kind."""
    return index if isinstance(index, int) and index < places else _mod(index, places)


def write(buffer, update, index):
    """Puts keys or values [B, K, T, H] into their places in `buffer` [B, K, R, H].

    Args:
        buffer: of a cache.
        update: what is new.
        index: the first one's position, or of a single one its place.

    Returns:
        The buffer, which on PyTorch is overwritten.
    """
    size, count = buffer.shape[2], update.shape[2]
    if count == 1 or (isinstance(index, int) and index + count <= size):
        return write_at(buffer, update, index, axis=2)
    held = positions(size, index + count - 1)
    new = ops.take(update, ops.maximum(held - index, 0), axis=2)
    return ops.where(ops.reshape(held >= index, (1, 1, size, 1)), new, buffer)


def _mod(index, places):
    # As a tensor: with a `floatx` of bfloat16, Keras on JAX takes a plain integer for a float32.
    return ops.mod(index, ops.convert_to_tensor(places, "int32"))
