"""Lookups on JAX: no float32 copy of a bfloat16 table, and a gradient that is made when it is needed."""

import jax
import jax.numpy as jnp
import keras
from keras import ops

from keras_t5gemma.kernels.barriers import materialized
from keras_t5gemma.kernels.embedding import reference
from keras_t5gemma.kernels.matmul.jax import has_quick_kernel


def rows(embedding, token_ids, only_gradient):
    """As `reference.rows`."""
    table = embedding.embeddings.value
    if has_quick_kernel(table):
        # XLA gathers in float32 and would convert the whole table before a decoding loop. The barrier makes each
        # lookup's table a new value, so it converts only the gathered rows.
        return ops.take(*materialized((table, token_ids)), axis=0)
    # Over several devices, the layer sees to where its output lies.
    if only_gradient and keras.distribution.distribution() is None:
        return _rows(table, token_ids)
    return reference.rows(embedding, token_ids, only_gradient)


@jax.custom_vjp
def _rows(table, ids):
    """[..., D] of a table [V, D] and ids [...].

    JAX's own gradient is added to zeros of the table's size, which XLA may make before anything else, and keep. Where
    the table has another gradient, too, it is added to that in place: such a table is better off with JAX's.
    """
    return jnp.take(table, ids, axis=0)


def _forward(table, ids):
    return _rows(table, ids), (table.shape, ids)


def _backward(kept, upstream):
    shape, ids = kept
    # A zero that waits for the gradient, and that XLA does not know for one: barriers are gone on CPUs when it decides.
    one = upstream[(0,) * upstream.ndim]
    zero = (jnp.isnan(one) & (one == 0)).astype(upstream.dtype)
    return jnp.broadcast_to(zero, shape).at[ids].add(upstream), None


_rows.defvjp(_forward, _backward)
