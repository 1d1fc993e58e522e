"""Attention's gradient on JAX: of what it computes on the way, one number per query and head is kept for it.

With logits `l`, capped logits `x = cap * tanh(l / cap)` of the visible keys, `log_sum_exp = log(sum(exp(x)))`, weights
`w = exp(x - log_sum_exp)` and the output `o = w v`, only `log_sum_exp` and `o` are kept. The backward pass computes `l`
again from queries and keys, and

    dv = w^T do        dw = do v^T        dx = w (dw - sum(w dw)), where sum(w dw) = sum(do o)

(arXiv 2205.14135, section 3.1). JAX's own gradient keeps several arrays of the logits' size a layer, and XLA takes
minutes to find out how a GPU had best compute what it makes of the softmax.
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
    """What is no tensor; the last three are those of a `BlockMask`."""

    cap: float | None
    dtype: str
    block: int | None = None
    causal: bool = False
    window: int | None = None

    def mask(self, query_segments, key_segments, query_start):
        return BlockMask(self.block, query_segments, key_segments, query_start, self.causal, self.window)


def attend(query, key, value, visible, *, cap, dtype):
    """`reference.attend`, with this gradient."""
    return _at_once(_Settings(cap, dtype), query, key, value, visible)


def in_blocks(query, key, value, mask, *, cap, dtype):
    """`reference.in_blocks`, with this gradient: that of a loop would keep every block."""
    settings = _Settings(cap, dtype, mask.block, mask.causal, mask.window)
    return _by_blocks(settings, query, key, value, mask.query_segments, mask.key_segments, mask.query_start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at_once(settings, *inputs):
    return _attend(settings, *inputs)[0]


def _at_once_forward(settings, *inputs):
    attended, log_sum_exp = _attend(settings, *inputs)
    return attended, (inputs, attended, log_sum_exp)


def _at_once_backward(settings, kept, upstream):
    inputs, attended, log_sum_exp = kept
    return *_gradients(settings, *inputs, log_sum_exp, _mean_gradients(attended, upstream), upstream), None


_at_once.defvjp(_at_once_forward, _at_once_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_blocks(settings, *inputs):
    return _by_blocks_forward(settings, *inputs)[0]


def _by_blocks_forward(settings, query, key, value, *of_mask):
    """The output of all blocks, and what the backward pass keeps."""
    mask = settings.mask(*of_mask)

    def block(rows, of_block):
        i, segments = of_block
        run, visible = keys_of_block(mask, i, segments, (key, value))
        # Made once for all heads, and outside of what XLA tries to fuse with the softmax.
        visible = jax.lax.optimization_barrier(visible)
        attended, log_sum_exp = _attend(settings, rows[i], *run, visible)
        return rows.at[i].set(attended), log_sum_exp

    # What is attended takes the place of the queries: for arrays of their own XLA makes the zeros of all layers at
    # once, and keeps them.
    attended, log_sum_exp = jax.lax.scan(block, split_queries(query, mask), _of_blocks(mask))
    attended = merge_queries(attended, mask)
    return attended, ((query, key, value, *of_mask), attended, log_sum_exp)


def _by_blocks_backward(settings, kept, upstream):
    """The gradients of query, key and value: a loop over blocks that sums those of keys and values."""
    (query, key, value, *of_mask), attended, log_sum_exp = kept
    mask = settings.mask(*of_mask)

    def block(carry, of_block):
        rows, *totals = carry
        i, segments, *of_rows = of_block
        first, _ = mask.run_of_keys(i)
        run, visible = keys_of_block(mask, i, segments, (key, value))
        of_query, *of_run = _gradients(settings, rows[i], *run, visible, *of_rows)
        totals = [_added(total, part, first) for total, part in zip(totals, of_run, strict=True)]
        return (rows.at[i].set(of_query), *totals), None

    # Sums over blocks are in float32, as within a product. Zeros that wait for the gradient, for the reason above.
    zero, upstream = jax.lax.optimization_barrier((jnp.zeros((), "float32"), upstream))
    totals = [jnp.broadcast_to(zero, x.shape) for x in (key, value)]
    of_rows = log_sum_exp, split_queries(_mean_gradients(attended, upstream), mask), split_queries(upstream, mask)
    (rows, *totals), _ = jax.lax.scan(block, (split_queries(query, mask), *totals), (*_of_blocks(mask), *of_rows))
    return merge_queries(rows, mask), *(x.astype(key.dtype) for x in totals), None, None, None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)


def _of_blocks(mask):
    """The number and the segments of each block."""
    return jnp.arange(num_blocks(mask), dtype="int32"), split_queries(mask.query_segments, mask)


def _added(total, part, first):
    """`total` [B, K, S, H] with `part` [B, K, s, H] added from key `first` on."""
    places = 0, 0, first, 0
    before = jax.lax.dynamic_slice(total, places, part.shape)
    return jax.lax.dynamic_update_slice(total, before + part.astype(total.dtype), places)


def _attend(settings, query, key, value, visible):
    """What `reference.attend` gives, and `log_sum_exp` [B, K, G, T, 1]."""
    x = soft_cap(attention_logits(query, key), settings.cap) + attention_bias(visible)
    largest = jnp.max(x, axis=-1, keepdims=True)
    weights = jnp.exp(x - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weighted_values(weights / total, value, visible, settings.dtype), largest + jnp.log(total)


def _gradients(settings, query, key, value, visible, log_sum_exp, means, upstream):
    """Those of query, key and value.

    Args:
        log_sum_exp: what `_attend` gave besides.
        means: what `_mean_gradients` gave.
        upstream: the output's [B, T, K, G, H].
    """
    logits, to_inputs = jax.vjp(attention_logits, query, key)
    capped, to_logits = jax.vjp(lambda logits: soft_cap(logits, settings.cap), logits)
    weights = jnp.exp(capped + attention_bias(visible) - log_sum_exp)
    _, to_weights = jax.vjp(lambda *args: weighted_values(*args, visible, settings.dtype), weights, value)
    of_weights, of_value = to_weights(upstream)
    means = jnp.expand_dims(jnp.moveaxis(means, 1, -1), -1)
    return *to_inputs(*to_logits(weights * (of_weights - means))), of_value


def _mean_gradients(attended, upstream):
    """The mean of the weights' gradients, by the weights: float32 [B, T, K, G] of two [B, T, K, G, H]."""
    return jnp.sum(attended.astype("float32") * upstream.astype("float32"), axis=-1)
