"""Attention on TensorFlow: a loop over blocks of queries, whose gradient is a loop too."""

import functools

import keras
from keras import ops

from keras_t5gemma.kernels.attention import query_blocks, reference
from keras_t5gemma.kernels.float16 import clip_to_range


def attend(query, key, value, visible, *, cap, dtype):
    """`reference.attend`, with another form of the first product in float16.

    Args:
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        visible: bool [B, T, S], True if the query may see the key.
        cap: soft cap on the logits, or None.
        dtype: dtype of the weights in their product with the values.

    Returns:
        [B, T, K, G, H]; zeros for a query that sees no key.
    """
    if keras.backend.standardize_dtype(key.dtype) != "float16":
        return reference.attend(query, key, value, visible, cap=cap, dtype=dtype)
    # With keys laid out for `reference.matmul`, TensorFlow's CPU kernel sums in float16, where infinities of both signs
    # make NaN.
    logits = ops.einsum("btkgh,bskh->bkgts", query, ops.swapaxes(key, 1, 2))
    weights = reference.softmax(ops.cast(clip_to_range(logits), "float32"), reference.attention_bias(visible), cap)
    return reference.weighted_values(weights, value, visible, dtype)


def _loop(block, count, query, segments, key, value):
    """Runs `block` for each block of queries, as `attend_by_blocks` asks, with a gradient written by hand.

    TensorFlow's own gradient would store every block, and unrolled blocks would run side by side.
    """
    import tensorflow as tf

    def loop(body, *sums):
        def step(i, blocks, *sums):
            output, *parts = body(i)
            added = [total + part for total, part in zip(sums, parts, strict=True)]
            for total, new in zip(sums, added, strict=True):
                new.set_shape(total.shape)  # a slice's gradient has no static shape: with K = 1 the loop would fail
            return i + 1, blocks.write(i, output), *added

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


in_blocks = functools.partial(query_blocks.attend_by_blocks, _loop, attend)
