"""Attention for one block of queries at a time: memory that grows with the length of a sequence, not with its square.

six queries in blocks of two, window 2, both directions: the keys [first, first + 4) of each block

    x x . .                       Each block sees the keys within its window, or all of them where there is none,
    x x x .                       so that its softmax is the plain one: the numbers are those of `attend` on all
      . x x x .                   queries at once.
        . x x x                   What a block computes on the way is computed again in the backward pass.
          . . x x x
              . x x
"""

import keras
from keras import ops

from keras_t5gemma.kernels.attention.reference import attend


def in_blocks(query, key, value, mask, *, cap, dtype):
    """`attend` on all queries, by blocks.

    Args:
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        mask: the `BlockMask`.
        cap: as of `attend`.
        dtype: likewise.

    Returns:
        [B, T, K, G, H].
    """
    if keras.config.backend() == "jax":
        from keras_t5gemma.kernels.attention import jax as attention_jax

        return attention_jax.in_blocks(query, key, value, mask, cap=cap, dtype=dtype)
    own_dtype = key.dtype

    def block(i, query, segments, key, value):
        run, visible = of_block(mask, i, segments, (key, value))
        return attend(query, *(ops.cast(x, own_dtype) for x in run), visible, cap=cap, dtype=dtype)

    # Gradients of keys and values are sums over blocks: in float32, as within a product.
    key, value = ops.cast(key, "float32"), ops.cast(value, "float32")
    loop = {"torch": _torch, "tensorflow": _tensorflow}[keras.config.backend()]
    blocks = loop(block, count(mask), cut(query, mask), cut(mask.query_segments, mask), key, value)
    return join(blocks, mask)


def count(mask):
    """C, the number of a mask's blocks of queries; like its lengths a scalar tensor if they are not known."""
    return -(-ops.shape(mask.query_segments)[1] // mask.block)


def cut(x, mask):
    """[B, T, ...] as [C, B, t, ...], filled up with zeros: padding, which sees nothing."""
    rest = [(0, 0)] * (len(x.shape) - 2)
    x = ops.pad(x, [(0, 0), (0, count(mask) * mask.block - ops.shape(x)[1]), *rest])
    return ops.swapaxes(ops.reshape(x, (ops.shape(x)[0], count(mask), mask.block, *x.shape[2:])), 0, 1)


def join(blocks, mask):
    """What `cut` has cut: [C, B, t, ...] as [B, T, ...]."""
    x = ops.swapaxes(blocks, 0, 1)
    x = ops.reshape(x, (ops.shape(x)[0], count(mask) * mask.block, *x.shape[3:]))
    return x[:, : ops.shape(mask.query_segments)[1]]


def of_block(mask, index, segments, arrays):
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


def _torch(block, count, query, segments, key, value):
    import torch

    step = keras.remat(block) if torch.is_grad_enabled() else block
    return torch.stack([step(i, query[i], segments[i], key, value) for i in range(count)])


def _tensorflow(block, count, query, segments, key, value):
    """A gradient of its own: that of a loop would keep every block, and unrolled blocks run side by side."""
    import tensorflow as tf

    def loop(body, *sums):
        def step(i, blocks, *sums):
            of_block, *parts = body(i)
            added = [total + part for total, part in zip(sums, parts, strict=True)]
            for total, new in zip(sums, added, strict=True):
                new.set_shape(total.shape)  # not known of a slice's gradient: with K = 1 the loop would be refused
            return i + 1, blocks.write(i, of_block), *added

        blocks = tf.TensorArray(query.dtype, size=count, element_shape=query.shape[1:])
        _, blocks, *sums = tf.while_loop(
            lambda i, *_: i < count, step, (0, blocks, *sums), parallel_iterations=1, maximum_iterations=count
        )
        return blocks.stack(), *sums

    @tf.custom_gradient
    def run(query, key, value):
        def gradients(upstream):
            def body(i):
                inputs = query[i], key, value
                with tf.GradientTape() as tape:
                    tape.watch(inputs)
                    attended = block(i, inputs[0], segments[i], key, value)
                return tape.gradient(attended, inputs, upstream[i])

            return loop(body, tf.zeros_like(key), tf.zeros_like(value))

        return loop(lambda i: (block(i, query[i], segments[i], key, value),))[0], gradients

    return run(query, key, value)
