"""Attention for one block of queries at a time: memory that grows with the length of a sequence, not with its square.

six queries in blocks of two, window 2, both directions: the keys [first, first + 4) of each block

    x x . .                       Each block sees the keys within its window, or all of them if there is none,
    x x x .                       so that its softmax is the plain one: the numbers are those of `attend` on all
      . x x x .                   queries at once.
        . x x x                   What a block computes on the way is computed again in the backward pass.
          . . x x x
              . x x
"""

from keras import ops


def attend_by_blocks(loop, attend, query, key, value, mask, *, cap, dtype):
    """`attend` on all queries, block by block.

    Args:
        loop: `(block, count, queries, segments, key, value) -> [C, B, t, K, G, H]`: runs `block(i, query, segments,
            key, value)` for each of `count` blocks.
        attend: of the backend, as `reference.attend`.
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        mask: the `BlockMask`.
        cap: as of `attend`.
        dtype: likewise.

    Returns:
        [B, T, K, G, H].
    """
    own_dtype = key.dtype

    def block(i, query, segments, key, value):
        run, visible = keys_of_block(mask, i, segments, (key, value))
        return attend(query, *(ops.cast(x, own_dtype) for x in run), visible, cap=cap, dtype=dtype)

    # Gradients of keys and values are sums over blocks: in float32, as within a product.
    key, value = ops.cast(key, "float32"), ops.cast(value, "float32")
    queries, segments = split_queries(query, mask), split_queries(mask.query_segments, mask)
    return merge_queries(loop(block, num_blocks(mask), queries, segments, key, value), mask)


def num_blocks(mask):
    """C, the number of a mask's blocks of queries; like its lengths a scalar tensor if they are not known."""
    return -(-ops.shape(mask.query_segments)[1] // mask.block)


def split_queries(x, mask):
    """[B, T, ...] as [C, B, t, ...], filled up with zeros: padding, which sees nothing."""
    rest = [(0, 0)] * (len(x.shape) - 2)
    x = ops.pad(x, [(0, 0), (0, num_blocks(mask) * mask.block - ops.shape(x)[1]), *rest])
    return ops.swapaxes(ops.reshape(x, (ops.shape(x)[0], num_blocks(mask), mask.block, *x.shape[2:])), 0, 1)


def merge_queries(blocks, mask):
    """What `split_queries` has split: [C, B, t, ...] as [B, T, ...]."""
    x = ops.swapaxes(blocks, 0, 1)
    x = ops.reshape(x, (ops.shape(x)[0], num_blocks(mask) * mask.block, *x.shape[3:]))
    return x[:, : ops.shape(mask.query_segments)[1]]


def keys_of_block(mask, index, segments, arrays):
    """What block `index` of the queries attends to.

    Args:
        mask: the `BlockMask`.
        index: an int or a scalar tensor.
        segments: int [B, t], the block's.
        arrays: of all keys, each [B, K, S, H].

    Returns:
        `(run, visible)`: those arrays [B, K, s, H] for the run of keys that the block may see, and bool [B, t, s].
    """
    first, length = mask.run_of_keys(index)
    run = [ops.slice(x, (0, 0, first, 0), (ops.shape(x)[0], x.shape[1], length, x.shape[3])) for x in arrays]
    return run, mask.of_block(index, segments, first, length)
