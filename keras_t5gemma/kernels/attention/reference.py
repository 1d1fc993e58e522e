"""Plain attention: the softmax of capped logits, and the values weighted by it. The oracle of all implementations."""

from keras import ops

from keras_t5gemma.kernels.attention.masks import attention_mask
from keras_t5gemma.kernels.float16 import clip_to_range
from keras_t5gemma.kernels.soft_cap import soft_cap

# Added to the logits of hidden keys before the softmax. It is far below any logit, and finite, so that a query that
# sees no key does not give NaN.
_HIDDEN = -1e30


def attend(query, key, value, visible, *, cap, dtype):
    """Softmax attention: the values, weighted by how well their keys match the queries.

    Args:
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        visible: bool [B, T, S], True if the query may see the key.
        cap: soft cap on the logits, or None.
        dtype: dtype of the weights in their product with the values. The softmax is in float32.

    Returns:
        [B, T, K, G, H]; zeros for a query that sees no key.
    """
    weights = softmax(attention_logits(query, key), attention_bias(visible), cap)
    return weighted_values(weights, value, visible, dtype)


def in_blocks(query, key, value, mask, *, cap, dtype):
    """`attend` with a `BlockMask`. This plain implementation builds the whole mask at once.

    Args:
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        mask: a `BlockMask`.
        cap: soft cap on the logits, or None.
        dtype: dtype of the weights in their product with the values.

    Returns:
        [B, T, K, G, H].
    """
    kind = {"query_start": mask.query_start, "causal": mask.causal, "window": mask.window}
    return attend(
        query, key, value, attention_mask(mask.query_segments, mask.key_segments, **kind), cap=cap, dtype=dtype
    )


def attention_logits(query, key):
    """Logits before the cap: float32 [B, K, G, T, S] of query [B, T, K, G, H] and key [B, K, S, H]."""
    return ops.cast(clip_to_range(matmul(ops.transpose(query, (0, 2, 3, 1, 4)), ops.swapaxes(key, 2, 3))), "float32")


def attention_bias(visible):
    """The term to add to capped logits: [B, 1, 1, T, S] of `visible` [B, T, S], 0 for a visible key."""
    # Both are tensors: Keras converts plain numbers to `floatx`, and -1e30 is infinite in float16.
    shown, hidden = ops.zeros((), "float32"), ops.convert_to_tensor(_HIDDEN, "float32")
    return ops.where(ops.expand_dims(visible, (1, 2)), shown, hidden)


def softmax(logits, bias, cap):
    """The attention weights.

    Args:
        logits: float32 [B, K, G, T, S], before the cap.
        bias: the `attention_bias`, float32 [B, 1, 1, T, S].
        cap: soft cap on the logits, or None.

    Returns:
        float32 [B, K, G, T, S].
    """
    # A sum rather than `where`, whose gradient is another pass over the logits if operations are not fused.
    return ops.softmax(soft_cap(logits, cap) + bias, axis=-1)


def weighted_values(weights, value, visible, dtype):
    """The output of attention.

    Args:
        weights: [B, K, G, T, S].
        value: [B, K, S, H].
        visible: bool [B, T, S].
        dtype: dtype of the weights in the product.

    Returns:
        [B, T, K, G, H]; zeros for a query that sees no key.
    """
    # Heads come first in both products: XLA:CPU takes two to three times as long for other orders.
    attended = ops.transpose(matmul(ops.cast(weights, dtype), value), (0, 3, 1, 2, 4))
    # A query that sees no key has weighted all keys alike. Replace that by zeros.
    sees = ops.reshape(ops.any(visible, axis=-1), (*ops.shape(attended)[:2], 1, 1, 1))
    return ops.where(sees, attended, 0.0)


def matmul(left, right):
    """[B, K, G, T, N] of left [B, K, G, T, M] and right [B, K, M, N]: one product per key head, groups as rows."""
    batch, heads, groups, length, size = ops.shape(left)
    product = ops.matmul(ops.reshape(left, (batch, heads, groups * length, size)), right)
    return ops.reshape(product, (batch, heads, groups, length, ops.shape(right)[3]))
