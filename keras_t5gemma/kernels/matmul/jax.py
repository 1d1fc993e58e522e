"""Products in the forms that XLA computes fast.

On CPUs XLA has one fast kernel for bfloat16. It needs two rows or more on the left, and a result in float32. If the
result is in bfloat16, or if the contracted axis comes first on the left, XLA converts both sides to float32 and takes
twice as long.

On GPUs XLA turns one row times a matrix of up to ten million numbers into a multiplication and a sum, and writes the
products to memory. That takes 17 microseconds on an H200 for 2,304 x 2,048 in bfloat16, where 3 would be enough
(benchmarks/log/2026-11-27-single-row-twice-on-gpus.md). Two rows use the matrix units. So a single row is duplicated.
This costs nothing: the time is spent reading the matrix.
"""

import functools
import math

import jax
import jax.numpy as jnp
import keras
from jax.experimental.layout import Layout, with_layout_constraint
from keras import ops

from keras_t5gemma.kernels.device import jax_on_gpu, on_cpu
from keras_t5gemma.kernels.matmul import reference

# Up to this many rows, the table comes first on CPUs: half as fast again.
_FEW_ROWS = 16


def dense(call, x, kernel):
    """`reference.dense`, with the fast bfloat16 kernel on CPUs and a duplicated single row on GPUs.

    Args:
        call: computes the product with the layer's kernel, as Keras does.
        x: [M, K], in the compute dtype.
        kernel: the layer's variable [K, N].

    Returns:
        [M, N].
    """
    if has_quick_kernel(x):
        return _dense_product(x, ops.convert_to_tensor(kernel, x.dtype))
    if is_single_row(x):
        return with_row_doubled(call, x)
    return call(x)


def table_product(x, table):
    """`reference.table_product`, with the fast bfloat16 kernel and with the table first for few rows, on CPUs."""
    rows = ops.reshape(x, (-1, x.shape[2]))
    if has_quick_kernel(x):
        logits = _float32_logits(rows, table)
        return ops.reshape(ops.cast(logits, x.dtype), (*ops.shape(x)[:2], -1))
    count = math.prod(x.shape[:2]) if all(isinstance(size, int) for size in x.shape[:2]) else math.inf
    if count > _FEW_ROWS or not on_cpu(x):
        return reference.table_product(x, table)
    # Without the barrier, XLA would swap the operands of a transposed product back.
    logits = ops.transpose(jax.lax.optimization_barrier(ops.matmul(table, ops.transpose(rows))))
    return ops.reshape(logits, (*x.shape[:2], -1))


def float32_product(equation, left, right):
    """`reference.float32_product`, with sums that stay in float32 for bfloat16 operands.

    Args:
        equation: the einsum's equation.
        left: the first operand, in the compute dtype.
        right: the second operand, in the compute dtype.

    Returns:
        The product in float32.
    """
    if equation == "mv,md->vd" and has_quick_kernel(left):
        return _columns_product(left, right)
    if keras.backend.standardize_dtype(left.dtype) == "bfloat16":
        # On CPUs, XLA's product of bfloat16 is fast if the sums stay in float32: a third of the time.
        return jnp.einsum(equation, left, right, preferred_element_type="float32")
    return reference.float32_product(equation, left, right)


def has_quick_kernel(x) -> bool:
    """Whether x is bfloat16 on a CPU."""
    return x.dtype == "bfloat16" and on_cpu(x)


def is_single_row(x) -> bool:
    """Whether x [M, K] is one row in half precision, on a GPU."""
    return tuple(x.shape[:-1]) == (1,) and x.dtype in ("bfloat16", "float16") and jax_on_gpu()


def with_row_doubled(product, x):
    """`product(x)` of a single row x [1, K], computed with two equal rows."""
    return product(ops.broadcast_to(x, (2, x.shape[1])))[:1]


def _float32_logits(x, table):
    """[M, V] in float32 of x [M, D] and a table [V, D]."""
    if x.shape[0] == 1:
        return with_row_doubled(functools.partial(_float32_logits, table=table), x)
    # The table is not transposed: a decoding loop would keep a float32 copy of a transposed one.
    return jnp.einsum("md,vd->mv", x, table, preferred_element_type="float32")


def _rows_product(left, right):
    """[M, N] in float32 of left [M, K] and right [K, N]."""
    return jnp.matmul(left, right, preferred_element_type="float32")


def _columns_product(left, right):
    """[M, N] in float32 of left [K, M], transposed in memory first, and right [K, N]."""
    return _rows_product(with_layout_constraint(ops.transpose(left), Layout((0, 1))), right)


@jax.custom_vjp
def _dense_product(x, kernel):
    """[M, N] in bfloat16 of x [M, K] and a kernel [K, N]. Its gradients use XLA's fast kernel too."""
    return _rows_product(x, kernel).astype(x.dtype)


def _forward(x, kernel):
    return _rows_product(x, kernel).astype(x.dtype), (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    x_gradient = jnp.einsum("mn,kn->mk", gradient, kernel, preferred_element_type="float32")
    return x_gradient.astype(x.dtype), _columns_product(x, gradient).astype(kernel.dtype)


_dense_product.defvjp(_forward, _backward)
