"""The loss over a large vocabulary in `keras.ops`. It is the oracle of the other implementations; JAX runs it too."""

from keras import ops

from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.cross_entropy.chunks import chunk_targets
from keras_t5gemma.kernels.matmul import PACKAGE as MATMUL
from keras_t5gemma.kernels.soft_cap import soft_cap


def sums(token_loss, targets, count, x, table):
    """Loss and accuracy of all chunks, without gradients.

    Args:
        token_loss: a `CrossEntropy`, or an object with its methods.
        targets: `(by_token, shared)`: arrays [C, m, ...], such as labels and shares, and arrays that all chunks share.
        count: C.
        x: hidden states [C, m, D], in the compute dtype.
        table: the projection [V, D].

    Returns:
        `[loss, accuracy]`, float32 [2].
    """
    table = ops.cast(table, x.dtype)

    def body(i, totals):
        return totals + _chunk_loss(token_loss, targets, i, x[i], table, gradients=False)[0]

    return ops.fori_loop(0, count, body, ops.zeros((2,), "float32"))


def sums_and_gradients(token_loss, targets, x, table, train_table):
    """Loss and accuracy of all chunks, and the gradients of the loss.

    Args:
        token_loss: a `CrossEntropy`, or an object with its methods.
        targets: `(by_token, shared)`: arrays [C, m, ...], such as labels and shares, and arrays that all chunks share.
        x: hidden states [C, m, D], in the compute dtype.
        table: the projection [V, D].
        train_table: whether the table's gradient is needed.

    Returns:
        `(sums, x_gradient)` or `(sums, x_gradient, table_gradient)`, float32 [2], [C, m, D] and [V, D].
    """
    compute = ops.cast(table, x.dtype)
    product = implementation(MATMUL).float32_product

    def chunk(i):
        added, gradient = _chunk_loss(token_loss, targets, i, x[i], compute, gradients=True)
        gradient = ops.cast(gradient, x.dtype)
        table_gradient = [product("mv,md->vd", gradient, x[i])] if train_table else []
        return added, ops.expand_dims(product("mv,vd->md", gradient, compute), 0), *table_gradient

    def body(i, carry):
        added, x_gradient, *table_gradient = chunk(i)
        return (
            carry[0] + added,
            ops.slice_update(carry[1], [i, 0, 0], x_gradient),
            *(total + part for total, part in zip(carry[2:], table_gradient, strict=True)),
        )

    # The first chunk is outside of the loop: adding its table gradient to zeros would move half a gigabyte three times.
    totals, x_gradient, *table_gradient = chunk(0)
    if x.shape[0] == 1:
        return totals, x_gradient, *table_gradient
    start = (totals, ops.slice_update(ops.zeros_like(x, "float32"), [0, 0, 0], x_gradient), *table_gradient)
    return ops.fori_loop(1, x.shape[0], body, start)


def _chunk_loss(token_loss, targets, i, x, table, gradients: bool):
    """`token_loss.of_logits` for chunk i: `([loss, accuracy], gradients or None)`."""
    logits = implementation(MATMUL).float32_product("md,vd->mv", x, table)
    arrays = token_loss.by_token(*chunk_targets(targets, i))
    return token_loss.of_logits(soft_cap(logits, token_loss.cap), *arrays, gradients=gradients)


def scaled(gradients, scale):
    """The gradients that `sums_and_gradients` computed, multiplied by a scalar."""
    return [gradient * scale for gradient in gradients]


def tensor_of(table):
    """A variable's tensor."""
    return ops.convert_to_tensor(table)
