"""Products in `keras.ops`."""

from keras import ops

from keras_t5gemma.kernels.float16 import clip_to_range


def dense(call, x, kernel):  # noqa: ARG001 other implementations multiply by it themselves
    """A layer's product.

    Args:
        call: x to the product with the layer's kernel, as Keras computes it.
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
    """An einsum in float32 of two operands in the compute dtype."""
    return ops.cast(clip_to_range(ops.einsum(equation, left, right)), "float32")
