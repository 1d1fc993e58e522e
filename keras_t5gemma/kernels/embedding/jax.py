"""Lookups on JAX: no float32 copy of a bfloat16 table, and a gradient that is allocated when it is needed."""

import jax
import jax.numpy as jnp
import keras
from keras import ops

from keras_t5gemma.kernels.barriers import materialized
from keras_t5gemma.kernels.embedding import reference
from keras_t5gemma.kernels.matmul.jax import has_quick_kernel


def rows(embedding, token_ids, only_gradient):
    """`reference.rows` in the form that suits the table's dtype and the number of devices.

    Args:
        embedding: a built `keras.layers.ReversibleEmbedding` in floating point, without LoRA.
        token_ids: int [B, T].
        only_gradient: whether no other operation, such as a projection, gives the table a gradient.

    Returns:
        [B, T, D], which may have the table's dtype.
    """
    table = embedding.embeddings.value
    if has_quick_kernel(table):
        # XLA gathers in float32 and would convert the whole table before a decoding loop. The barrier makes each
        # lookup's table a new value, so it converts only the gathered rows.
        return ops.take(*materialized((table, token_ids)), axis=0)
    # On several devices, the layer itself sets the layout of its output.
    if only_gradient and keras.distribution.distribution() is None:
        return _rows(table, token_ids)
    return reference.rows(embedding, token_ids, only_gradient)


@jax.custom_vjp
def _rows(table, ids):
    """[..., D] of a table [V, D] and ids [...].

    JAX's own gradient is added to zeros of the table's size, which XLA may allocate before anything else, and keep. If
    the table has a second gradient, JAX's is added to that one in place. So such a table uses JAX's own gradient.
    """
    return jnp.take(table, ids, axis=0)


def _forward(table, ids):
    return _rows(table, ids), (table.shape, ids)


def _backward(residuals, upstream):
    shape, ids = residuals
    # A zero that depends on the gradient and that XLA cannot simplify. On CPUs, XLA has removed barriers by then.
    one = upstream[(0,) * upstream.ndim]
    zero = (jnp.isnan(one) & (one == 0)).astype(upstream.dtype)
    return jnp.broadcast_to(zero, shape).at[ids].add(upstream), None


_rows.defvjp(_forward, _backward)
