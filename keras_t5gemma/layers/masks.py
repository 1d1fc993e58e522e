"""Who may attend to whom: boolean masks from distances and segment ids."""

from keras import ops


def attention_mask(query_segments, key_segments, *, query_start=0, causal=False, window=None):
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

    Returns:
        bool [B, T, S].
    """
    queries, keys = ops.expand_dims(query_segments, 2), ops.expand_dims(key_segments, 1)
    visible = ops.logical_and(ops.equal(queries, keys), ops.not_equal(keys, 0))
    if not causal and window is None:
        return visible
    query_positions = ops.add(ops.arange(ops.shape(query_segments)[1], dtype="int32"), query_start)
    key_positions = ops.arange(ops.shape(key_segments)[1], dtype="int32")
    distance = ops.expand_dims(query_positions, 1) - ops.expand_dims(key_positions, 0)
    if causal:
        visible = ops.logical_and(visible, distance >= 0)
    if window is not None:
        visible = ops.logical_and(visible, ops.abs(distance) < window)
    return visible
