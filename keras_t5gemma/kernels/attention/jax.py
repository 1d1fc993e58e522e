"""Attention on JAX, with a gradient that stores one number per query and head.

With logits `l`, capped logits `x = cap * tanh(l / cap)` of the visible keys, `log_sum_exp = log(sum(exp(x)))`, weights
`w = exp(x - log_sum_exp)` and the output `o = w v`, only `log_sum_exp` and `o` are stored. The backward pass computes
`l` again from queries and keys, and

    dv = w^T do        dw = do v^T        dx = w (dw - sum(w dw)), where sum(w dw) = sum(do o)

(arXiv 2205.14135, section 3.1). JAX's own gradient stores several arrays of the logits' size per layer. XLA also takes
minutes to tune its softmax code for a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from keras_t5gemma.kernels.attention.masks import BlockMask
from keras_t5gemma.kernels.attention.query_blocks import keys_of_block, merge_queries, num_blocks, split_queries
from keras_t5gemma.kernels.attention.reference import attention_bias, attention_logits, weighted_values
from keras_t5gemma.kernels.soft_cap import soft_cap


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The static arguments of attention. The last three are those of a `BlockMask`."""

    cap: float | None
    dtype: str
    block: int | None = None
    causal: bool = False
    window: int | None = None

    def mask(self, query_segments, key_segments, query_start) -> BlockMask:
        """Creates the mask.

        Args:
            query_segments: int [B, T], segment ids of the queries.
            key_segments: int [B, S], segment ids of the keys.
            query_start: position of the first query, counted from the first key.

        Returns:
            The `BlockMask` with these tensors and settings.
        """
        return BlockMask(self.block, query_segments, key_segments, query_start, self.causal, self.window)


def attend(query, key, value, visible, *, cap, dtype):
    """`reference.attend` with the gradient of this module.

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
    return _attend_at_once(_Settings(cap, dtype), query, key, value, visible)


def in_blocks(query, key, value, mask, *, cap, dtype):
    """`reference.in_blocks` with the gradient of this module: JAX's gradient of a loop would store every block.

    Args:
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        mask: a `BlockMask`.
        cap: soft cap on the logits, or None.
        dtype: dtype of the weights in their product with the values.

    Returns:
        [B, T, K, G, H]; zeros for a query that sees no key.
    """
    settings = _Settings(cap, dtype, mask.block, mask.causal, mask.window)
    return _attend_by_blocks(settings, query, key, value, mask.query_segments, mask.key_segments, mask.query_start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_at_once(settings, *inputs):
    return _attend(settings, *inputs)[0]


def _at_once_forward(settings, *inputs):
    attended, log_sum_exp = _attend(settings, *inputs)
    return attended, (inputs, attended, log_sum_exp)


def _at_once_backward(settings, residuals, upstream):
    inputs, attended, log_sum_exp = residuals
    return *_gradients(settings, *inputs, log_sum_exp, _mean_gradients(attended, upstream), upstream), None


_attend_at_once.defvjp(_at_once_forward, _at_once_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_by_blocks(settings, *inputs):
    return _by_blocks_forward(settings, *inputs)[0]


def _by_blocks_forward(settings, query, key, value, *mask_tensors):
    """The output of all blocks, and the residuals of the backward pass."""
    mask = settings.mask(*mask_tensors)

    def block(rows, block_inputs):
        i, segments = block_inputs
        keys_values, visible = keys_of_block(mask, i, segments, (key, value))
        # Computed once for all heads, and outside of the code that XLA tries to fuse with the softmax.
        visible = jax.lax.optimization_barrier(visible)
        attended, log_sum_exp = _attend(settings, rows[i], *keys_values, visible)
        return rows.at[i].set(attended), log_sum_exp

    # The outputs overwrite the queries. For separate output arrays, XLA would allocate the zeros of all layers at once
    # and keep them.
    attended, log_sum_exp = jax.lax.scan(block, split_queries(query, mask), _block_inputs(mask))
    attended = merge_queries(attended, mask)
    return attended, ((query, key, value, *mask_tensors), attended, log_sum_exp)


def _by_blocks_backward(settings, residuals, upstream):
    """The gradients of query, key and value: a loop over blocks that sums those of keys and values."""
    (query, key, value, *mask_tensors), attended, log_sum_exp = residuals
    mask = settings.mask(*mask_tensors)

    def block(carry, block_inputs):
        rows, *totals = carry
        i, segments, *row_inputs = block_inputs
        first, _ = mask.key_range(i)
        keys_values, visible = keys_of_block(mask, i, segments, (key, value))
        query_gradient, *gradients = _gradients(settings, rows[i], *keys_values, visible, *row_inputs)
        totals = [_add_at(total, part, first) for total, part in zip(totals, gradients, strict=True)]
        return (rows.at[i].set(query_gradient), *totals), None

    # Sums over blocks are in float32, as within a product. The barrier delays the zeros until the gradient is there, so
    # that XLA does not allocate those of all layers at once.
    zero, upstream = jax.lax.optimization_barrier((jnp.zeros((), "float32"), upstream))
    totals = [jnp.broadcast_to(zero, x.shape) for x in (key, value)]
    row_inputs = log_sum_exp, split_queries(_mean_gradients(attended, upstream), mask), split_queries(upstream, mask)
    inputs = *_block_inputs(mask), *row_inputs
    (rows, *totals), _ = jax.lax.scan(block, (split_queries(query, mask), *totals), inputs)
    return merge_queries(rows, mask), *(x.astype(key.dtype) for x in totals), None, None, None


_attend_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)


def _block_inputs(mask):
    """The index of each block, int [C], and its segments, int [C, B, t]."""
    return jnp.arange(num_blocks(mask), dtype="int32"), split_queries(mask.query_segments, mask)


def _add_at(total, part, first):
    """`total` [B, K, S, H] with `part` [B, K, s, H] added from key `first` on."""
    start = 0, 0, first, 0
    previous = jax.lax.dynamic_slice(total, start, part.shape)
    return jax.lax.dynamic_update_slice(total, previous + part.astype(total.dtype), start)


def _attend(settings, query, key, value, visible):
    """The output of `reference.attend`, and `log_sum_exp` [B, K, G, T, 1]."""
    x = soft_cap(attention_logits(query, key), settings.cap) + attention_bias(visible)
    largest = jnp.max(x, axis=-1, keepdims=True)
    weights = jnp.exp(x - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weighted_values(weights / total, value, visible, settings.dtype), largest + jnp.log(total)


def _gradients(settings, query, key, value, visible, log_sum_exp, means, upstream):
    """The gradients of query, key and value.

    Args:
        settings: a `_Settings`.
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        visible: bool [B, T, S].
        log_sum_exp: the second result of `_attend`, [B, K, G, T, 1].
        means: the result of `_mean_gradients`, [B, T, K, G].
        upstream: the gradient of the output, [B, T, K, G, H].

    Returns:
        Three tensors with the shapes of query, key and value.
    """
    logits, to_inputs = jax.vjp(attention_logits, query, key)
    capped, to_logits = jax.vjp(lambda logits: soft_cap(logits, settings.cap), logits)
    weights = jnp.exp(capped + attention_bias(visible) - log_sum_exp)
    _, to_weights = jax.vjp(lambda *args: weighted_values(*args, visible, settings.dtype), weights, value)
    weights_gradient, value_gradient = to_weights(upstream)
    means = jnp.expand_dims(jnp.moveaxis(means, 1, -1), -1)
    return *to_inputs(*to_logits(weights * (weights_gradient - means))), value_gradient


def _mean_gradients(attended, upstream):
    """The weighted mean of the attention weights' gradients: float32 [B, T, K, G] of two tensors [B, T, K, G, H]."""
    return jnp.sum(attended.astype("float32") * upstream.astype("float32"), axis=-1)
