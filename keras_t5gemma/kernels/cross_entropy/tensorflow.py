"""The chunked loss on TensorFlow: TensorFlow's products (oneDNN on CPUs), and XLA for the operations between them.

Run one by one, the operations between the products would allocate six tensors of the logits' size. An XLA program that
includes the products is slower on CPUs: several times slower in bfloat16.
"""

import functools

import tensorflow as tf
from keras import ops

from keras_t5gemma.kernels.cross_entropy.chunks import chunk_targets
from keras_t5gemma.kernels.cross_entropy.reference import scaled  # noqa: F401 the rest of the interface
from keras_t5gemma.kernels.float16 import clip_to_range
from keras_t5gemma.kernels.soft_cap import soft_cap


def sums_and_gradients(token_loss, targets, x, table, train_table):
    """`reference.sums_and_gradients` in one TensorFlow function.

    Args:
        token_loss: a hashable `CrossEntropy`, or an object with its methods. Each has its own compiled function.
        targets: `(by_token, shared)` as in `chunk_targets`.
        x: hidden states [C, m, D], in the compute dtype.
        table: the projection [V, D].
        train_table: whether the table's gradient is needed.

    Returns:
        `(sums, x_gradient)` or `(sums, x_gradient, table_gradient)`.
    """
    # Without `stop_gradient`, an eager tape would record gradients of the program itself.
    return _program(token_loss, train_table)(targets, tf.stop_gradient(x), tf.stop_gradient(table))


@functools.cache
def _program(token_loss, train_table):
    """The loop over chunks as one TensorFlow function, compiled once per token loss."""
    between = _between_products(token_loss)

    @tf.function(autograph=False)
    def program(targets, x, table):
        compute = tf.cast(table, x.dtype)

        def chunk(i):
            by_token = token_loss.by_token(*chunk_targets(targets, i))
            sums, gradient = between(tf.matmul(x[i], compute, transpose_b=True), *by_token)
            x_gradient = tf.cast(tf.matmul(gradient, compute), tf.float32)
            if not train_table:
                return sums, x_gradient
            return sums, x_gradient, tf.cast(tf.matmul(gradient, x[i], transpose_a=True), tf.float32)

        def body(i, sums, x_gradient, *table_gradient):
            added, rows, *part = chunk(i)
            return (
                i + 1,
                sums + added,
                tf.tensor_scatter_nd_update(x_gradient, [[i]], rows[None]),
                *(total + part for total, part in zip(table_gradient, part, strict=True)),
            )

        # The first chunk is outside of the loop, so that its table gradient is not added to zeros.
        sums, first, *table_gradient = chunk(0)
        if x.shape[0] == 1:
            return sums, first[None], *table_gradient
        count = tf.shape(x)[0]
        x_gradient = tf.tensor_scatter_nd_update(tf.zeros(tf.shape(x)), [[0]], first[None])
        # One chunk at a time, so that only one chunk's logits are in memory.
        _, *results = tf.while_loop(
            lambda i, *_: i < count, body, (1, sums, x_gradient, *table_gradient), parallel_iterations=1
        )
        return tuple(results)

    return program


def _between_products(token_loss):
    """An XLA program from raw logits to `([loss, accuracy], gradients)`, without the products around it."""

    @tf.function(jit_compile=True, autograph=False)
    def program(logits, *by_token):
        capped = soft_cap(tf.cast(clip_to_range(logits), tf.float32), token_loss.cap)
        sums, gradient = token_loss.of_logits(capped, *by_token, gradients=True)
        return sums, tf.cast(gradient, logits.dtype)

    return program


def tensor_of(table):
    """A variable's tensor: TensorFlow's custom gradients do not take variables in eager mode."""
    return tf.convert_to_tensor(ops.convert_to_tensor(table))
