"""Products in the forms that XLA is quick with.

On CPUs it has one quick kernel for bfloat16: two rows or more on the left, and sums left in float32. With a result in
bfloat16, or with the contracted axis first on the left, it converts both sides to float32, and takes twice as long.

On GPUs it turns one row times a matrix of up to ten million numbers into a multiplication and a sum, and writes the
products to memory: 17 microseconds on an H200 for 2,304 x 2,048 in bfloat16, of which 3 would do
(benchmarks/log/2026-11-27-single-row-twice-on-gpus.md). Two rows go to its matrix units. So a single row is doubled,
which costs nothing: the time is spent reading the matrix.
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

# Rows up to which the table comes first on CPUs: half as fast again.
_FEW_ROWS = 16


def dense(call, x, kernel):
    """As `reference.dense`."""
    if has_quick_kernel(x):
        return _dense_product(x, ops.convert_to_tensor(kernel, x.dtype))
    if is_single_row(x):
        return with_row_doubled(call, x)
    return call(x)


def table_product(x, table):
    """As `reference.table_product`."""
    rows = ops.reshape(x, (-1, x.shape[2]))
    if has_quick_kernel(x):
        logits = _float32_logits(rows, table)
        return ops.reshape(ops.cast(logits, x.dtype), (*ops.shape(x)[:2], -1))
    count = math.inf if None in x.shape[:2] else x.shape[0] * x.shape[1]
    if count > _FEW_ROWS or not on_cpu(x):
        return reference.table_product(x, table)
    # XLA would turn a product that is transposed around again.
    logits = ops.transpose(jax.lax.optimization_barrier(ops.matmul(table, ops.transpose(rows))))
    return ops.reshape(logits, (*x.shape[:2], -1))


def float32_product(equation, left, right):
    """As `reference.float32_product`."""
    if equation == "mv,md->vd" and has_quick_kernel(left):
        return _columns_product(left, right)
    if keras.backend.standardize_dtype(left.dtype) == "bfloat16":
        # Sums that stay in float32 are what XLA has a quick product of bfloat16 for on CPUs: a third of the time.
        return jnp.einsum(equation, left, right, preferred_element_type="float32")
    return reference.float32_product(equation, left, right)


def has_quick_kernel(x):
    """Whether x is bfloat16 on a CPU."""
    return x.dtype == "bfloat16" and on_cpu(x)


def is_single_row(x):
    """Whether x [M, K] is one row in half precision, on a GPU."""
    return tuple(x.shape[:-1]) == (1,) and x.dtype in ("bfloat16", "float16") and jax_on_gpu()


def with_row_doubled(product, x):
    """`product(x)` of a single row x [1, K], computed of two."""
    return product(ops.broadcast_to(x, (2, x.shape[1])))[:1]


def _float32_logits(x, table):
    """[M, V] in float32 of x [M, D] and a table [V, D]."""
    if x.shape[0] == 1:
        return with_row_doubled(functools.partial(_float32_logits, table=table), x)
    # Not of a transposed table, of which a decoding loop keeps a copy in float32.
    return jnp.einsum("md,vd->mv", x, table, preferred_element_type="float32")


def _rows_product(left, right):
    """[M, N] in float32 of left [M, K] and right [K, N]."""
    return jnp.matmul(left, right, preferred_element_type="float32")


def _columns_product(left, right):
    """[M, N] in float32 of left [K, M], which is transposed in memory, and right [K, N]."""
    return _rows_product(with_layout_constraint(ops.transpose(left), Layout((0, 1))), right)


@jax.custom_vjp
def _dense_product(x, kernel):
    """[M, N] in bfloat16 of x [M, K] and a kernel [K, N], with gradients by the same kernel of XLA's."""
    return _rows_product(x, kernel).astype(x.dtype)


def _forward(x, kernel):
    return _rows_product(x, kernel).astype(x.dtype), (x, kernel)


def _backward(saved, gradient):
    x, kernel = saved
    x_gradient = jnp.einsum("mn,kn->mk", gradient, kernel, preferred_element_type="float32")
    return x_gradient.astype(x.dtype), _columns_product(x, gradient).astype(kernel.dtype)


_dense_product.defvjp(_forward, _backward)
