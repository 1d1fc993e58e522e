"""Attention for one block of queries at a time: memory that grows with the length of a sequence, not with its square.

six queries in blocks of two, window 2, both directions: the keys [first, first + 4) of each block

    x x . .                       Each block sees the keys within its window, or all of them where there is none,
    x x x .                       so that its softmax is the plain one: the numbers are those of `attend` on all
      . x x x .                   queries at once.
        . x x x                   What a block computes on the way is computed again in the backward pass.
          . . x x x
              . x x
"""

import functools

import keras
from keras import ops


def in_blocks(attend, query, key, value, mask):
    """`attend` on all queries, by blocks.

    Args:
        attend: query, key, value and bool [B, t, s] to [B, t, K, G, H]; no variables.
        query: [B, T, K, G, H].
        key: [B, K, S, H].
        value: [B, K, S, H].
        mask: the `BlockMask`.

    Returns:
        [B, T, K, G, H].
    """
    batch, queries = ops.shape(query)[0], query.shape[1]
    count = -(-queries // mask.block)
    dtype = key.dtype

    def cut(x):
        """[B, T, ...] as [C, B, t, ...], filled up with zeros: padding, which sees nothing."""
        x = ops.pad(x, [(0, 0), (0, count * mask.block - queries)] + [(0, 0)] * (len(x.shape) - 2))
        return ops.swapaxes(ops.reshape(x, (batch, count, mask.block, *x.shape[2:])), 0, 1)

    def block(i, query, segments, key, value):
        first, length = mask.run_of_keys(i)
        run = [ops.slice(x, (0, 0, first, 0), (batch, x.shape[1], length, x.shape[3])) for x in (key, value)]
        visible = mask.of_block(i, segments, first, length)
        return attend(query, *(ops.cast(x, dtype) for x in run), visible)

    # Gradients of keys and values are sums over blocks: in float32, as within a product.
    key, value = ops.cast(key, "float32"), ops.cast(value, "float32")
    attended = _LOOPS[keras.config.backend()](block, count, cut(query), cut(mask.query_segments), key, value)
    attended = ops.swapaxes(attended, 0, 1)
    return ops.reshape(attended, (batch, count * mask.block, *query.shape[2:]))[:, :queries]


def _jax(block, count, query, segments, key, value):
    import jax

    # The loop itself keeps XLA from merging the two computations, which would keep what is to be computed again.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(key, value, i, query, segments):
        return block(i, query, segments, key, value)

    return jax.lax.map(lambda xs: step(key, value, *xs), (ops.arange(count, dtype="int32"), query, segments))


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
            return i + 1, blocks.write(i, of_block), *(total + part for total, part in zip(sums, parts, strict=True))

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


# Backends differ in how a loop is written, and in how its gradient is kept from keeping every block's logits.
_LOOPS = {"jax": _jax, "torch": _torch, "tensorflow": _tensorflow}
