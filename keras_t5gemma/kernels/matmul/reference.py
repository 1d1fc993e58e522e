"""Products in `keras.ops`."""

from keras import ops

from keras_t5gemma.kernels.float16 import clip_to_range


def dense(call, x, kernel):  # noqa: ARG001 other implementations compute the product themselves
    """A layer's product.

    Args:
        call: computes the product of x with the layer's kernel, as Keras does.
        x: [M, K], in the compute dtype.
        kernel: the layer's variable [K, N].

    Returns:
        [M, N].
    """
    return call(x)


def table_product(x, table):
    """Logits [B, T, V] of x [B, T, D] and a table [V, D], all in one dtype."""
    return ops.einsum("btd,vd->btv", x, table)


def float32_product(equation, left, right):
    """An einsum of two operands in the compute dtype, converted to float32.

    Args:
        equation: the einsum's equation.
        left: the first operand.
        right: the second operand.

    Returns:
        The product in float32. In float16 it is clipped to the dtype's range first.
    """
    return ops.cast(clip_to_range(ops.einsum(equation, left, right)), "float32")
