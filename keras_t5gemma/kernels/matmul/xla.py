"""Products in half precision in the forms that XLA is quick with.

On CPUs it has one quick kernel for bfloat16: two rows or more on the left, and sums left in float32. With a result in
bfloat16, or with what is contracted first on the left, it takes float32 of both sides instead, and twice as long.

On GPUs it takes one row times a matrix of up to ten million numbers for a multiplication and a sum, and writes what it
has multiplied to memory: 17 microseconds on an H200 for 2,304 x 2,048 in bfloat16, of which 3 would do
(benchmarks/RESULTS.md). Two rows go to its matrix units.

So a row that is alone comes twice, which costs nothing: what takes time is to read the matrix. Other backends have no
such need.
"""

import functools

import keras
from keras import ops

from keras_t5gemma.kernels.device import jax_on_gpu, on_cpu


def has_quick_kernel(x):
    """Whether CPUs' products are for tensor x: bfloat16, with JAX."""
    return keras.config.backend() == "jax" and x.dtype == "bfloat16" and on_cpu(x)


def is_lone_row(x):
    """Whether x [M, K] is one row that a GPU is to have twice, in half precision and with JAX."""
    if keras.config.backend() != "jax" or tuple(x.shape[:-1]) != (1,):
        return False
    return x.dtype in ("bfloat16", "float16") and jax_on_gpu()


def twice(product, x):
    """`product(x)` of a row x [1, K], which comes twice."""
    return product(ops.broadcast_to(x, (2, x.shape[1])))[:1]


def rows_times(left, right):
    """[M, N] in float32 of left [M, K] and right [K, N]."""
    import jax.numpy as jnp

    return jnp.matmul(left, right, preferred_element_type="float32")


def columns_times(left, right):
    """[M, N] in float32 of left [K, M], which is transposed in memory, and right [K, N]."""
    from jax.experimental.layout import Layout, with_layout_constraint

    return rows_times(with_layout_constraint(ops.transpose(left), Layout((0, 1))), right)


def table_product(x, table):
    """[M, V] in float32 of x [M, D] and a table [V, D]."""
    if x.shape[0] == 1:
        return twice(functools.partial(table_product, table=table), x)
    import jax.numpy as jnp

    # Not `rows_times` a transposed table, for which a decoding loop keeps a copy in float32.
    return jnp.einsum("md,vd->mv", x, table, preferred_element_type="float32")


def dense_product(x, kernel):
    """[M, N] in bfloat16 of x [M, K] and a kernel [K, N], with gradients by the same kernel of XLA's."""
    return _differentiable()(x, kernel)


@functools.cache
def _differentiable():
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def product(x, kernel):
        return rows_times(x, kernel).astype(x.dtype)

    def forward(x, kernel):
        return product(x, kernel), (x, kernel)

    def backward(saved, gradient):
        x, kernel = saved
        x_gradient = jnp.einsum("mn,kn->mk", gradient, kernel, preferred_element_type="float32")
        return x_gradient.astype(x.dtype), columns_times(x, gradient).astype(kernel.dtype)

    product.defvjp(forward, backward)
    return product
