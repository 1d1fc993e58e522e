"""Attention for one block of queries at a time: memory grows with the length of a sequence, not with its square.

six queries in blocks of two, window 2, both directions: the keys [first, first + 4) of each block

    x x . .                       Each block sees the keys within its window, or all keys if there is no window.
    x x x .                       So its softmax is the plain one, and the numbers are those of `attend` on all
      . x x x .                   queries at once.
        . x x x                   The backward pass recomputes a block's intermediate results.
          . . x x x
              . x x
"""

from keras import ops


def attend_by_blocks(loop, attend, query, key, value, mask, *, cap, dtype):
    """Calls `attend` on all queries, one block at a time.

    Args:
        loop: `(block, count, queries, segments, key, value) -> [C, B, t, K, G, H]`. It runs `block(i, query, segments,
            key, value)` for each of `count` blocks.
        attend: the backend's implementation of `reference.attend`.
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        mask: the `BlockMask`.
        cap: soft cap on the logits, or None.
        dtype: dtype of the weights in their product with the values.

    Returns:
        [B, T, K, G, H].
    """
    compute_dtype = key.dtype

    def block(i, query, segments, key, value):
        keys_values, visible = keys_of_block(mask, i, segments, (key, value))
        return attend(query, *(ops.cast(x, compute_dtype) for x in keys_values), visible, cap=cap, dtype=dtype)

    # Gradients of keys and values are sums over blocks: in float32, as within a product.
    key, value = ops.cast(key, "float32"), ops.cast(value, "float32")
    queries, segments = split_queries(query, mask), split_queries(mask.query_segments, mask)
    return merge_queries(loop(block, num_blocks(mask), queries, segments, key, value), mask)


def num_blocks(mask):
    """C, the number of blocks of a mask; a scalar tensor if its lengths are known only when the program runs."""
    return -(-ops.shape(mask.query_segments)[1] // mask.block)


def split_queries(x, mask):
    """Splits [B, T, ...] into [C, B, t, ...]. Zeros fill the last block: they are padding, which sees no key."""
    no_padding = [(0, 0)] * (len(x.shape) - 2)
    x = ops.pad(x, [(0, 0), (0, num_blocks(mask) * mask.block - ops.shape(x)[1]), *no_padding])
    return ops.swapaxes(ops.reshape(x, (ops.shape(x)[0], num_blocks(mask), mask.block, *x.shape[2:])), 0, 1)


def merge_queries(blocks, mask):
    """The inverse of `split_queries`: merges [C, B, t, ...] into [B, T, ...]."""
    x = ops.swapaxes(blocks, 0, 1)
    x = ops.reshape(x, (ops.shape(x)[0], num_blocks(mask) * mask.block, *x.shape[3:]))
    return x[:, : ops.shape(mask.query_segments)[1]]


def keys_of_block(mask, index, segments, arrays):
    """The keys and values that block `index` of the queries may see, and its mask.

    Args:
        mask: the `BlockMask`.
        index: an int or a scalar tensor.
        segments: int [B, t], segment ids of the block's queries.
        arrays: arrays of all keys, each [B, K, S, H].

    Returns:
        `(slices, visible)`: the arrays cut to the block's range of keys, each [B, K, s, H], and bool [B, t, s].
    """
    first, length = mask.key_range(index)
    slices = [ops.slice(x, (0, 0, first, 0), (ops.shape(x)[0], x.shape[1], length, x.shape[3])) for x in arrays]
    return slices, mask.block_visible(index, segments, first, length)
