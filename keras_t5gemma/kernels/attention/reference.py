"""Attention itself: the softmax of capped logits, and the values weighted by it."""

import keras
from keras import ops

from keras_t5gemma.kernels.float16 import finite

# Added to hidden logits before the softmax: far below any logit, and finite, so that a query that sees no key gives no
# NaN.
_HIDDEN = -1e30


def soft_cap(logits, cap):
    """`cap * tanh(logits / cap)`, or the logits themselves where `cap` is None."""
    return logits if cap is None else ops.tanh(logits / cap) * cap


def soft_cap_of_own(logits, cap):
    """`soft_cap` of logits that nobody else has: in place on PyTorch, where no gradient is wanted."""
    if cap is None or not _may_overwrite():
        return soft_cap(logits, cap)
    return logits.div_(cap).tanh_().mul_(cap)


def attend(query, key, value, visible, *, cap, dtype):
    """Values, weighted by how well their keys answer the queries.

    Args:
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        visible: bool [B, T, S], True where the query may see the key.
        cap: soft cap on the logits, or None.
        dtype: of the weights in their product with the values; the softmax is in float32.

    Returns:
        [B, T, K, G, H]; zeros for a query that sees no key.
    """
    weights = (_weights_in_place if _may_overwrite() else _weights)(logits_of(query, key), hidden_logits(visible), cap)
    return weigh(weights, value, visible, dtype)


def logits_of(query, key):
    """Logits before the cap: float32 [B, K, G, T, S] of query [B, T, K, G, H] and key [B, K, S, H]."""
    return ops.cast(finite(_products(query, key)), "float32")


def hidden_logits(visible):
    """What to add to capped logits: [B, 1, 1, T, S] of `visible` [B, T, S], 0 where a key is visible."""
    # Both as tensors: Keras would take plain numbers for `floatx`, and -1e30 is infinite in float16.
    shown, hidden = ops.zeros((), "float32"), ops.convert_to_tensor(_HIDDEN, "float32")
    return ops.where(ops.expand_dims(visible, (1, 2)), shown, hidden)


def weigh(weights, value, visible, dtype):
    """[B, T, K, G, H]: values [B, K, S, H] by weights [B, K, G, T, S]; zeros where nothing is `visible` [B, T, S]."""
    # Heads come first in both products: XLA:CPU takes two to three times as long for others.
    attended = ops.transpose(matmul(ops.cast(weights, dtype), value), (0, 3, 1, 2, 4))
    # A query that sees nothing has weighed all keys alike: make that the zeros it should be.
    sees = ops.reshape(ops.any(visible, axis=-1), (*ops.shape(attended)[:2], 1, 1, 1))
    return ops.where(sees, attended, 0.0)


def _products(query, key):
    """[B, K, G, T, S] of query [B, T, K, G, H] and key [B, K, S, H]."""
    if keras.config.backend() == "tensorflow" and keras.backend.standardize_dtype(key.dtype) == "float16":
        # With keys laid out so, TensorFlow's CPU kernel sums in float16, where infinities of both signs make NaN.
        return ops.einsum("btkgh,bskh->bkgts", query, ops.swapaxes(key, 1, 2))
    return matmul(ops.transpose(query, (0, 2, 3, 1, 4)), ops.swapaxes(key, 2, 3))


def matmul(left, right):
    """[B, K, G, T, N] of left [B, K, G, T, M] and right [B, K, M, N]: a product for each of K heads, groups as rows."""
    batch, heads, groups, length, size = ops.shape(left)
    product = ops.matmul(ops.reshape(left, (batch, heads, groups * length, size)), right)
    return ops.reshape(product, (batch, heads, groups, length, ops.shape(right)[3]))


def _weights(logits, hidden, cap):
    """The softmax of capped logits [B, K, G, T, S] and `hidden_logits`."""
    # Added, since the gradient of a choice is another pass over the logits where nothing fuses them.
    return ops.softmax(soft_cap(logits, cap) + hidden, axis=-1)


def _may_overwrite():
    """On PyTorch each step would make a tensor of the logits' size, which the system has to find and clear."""
    if keras.config.backend() != "torch":
        return False
    import torch

    return not torch.is_grad_enabled()


def _weights_in_place(logits, hidden, cap):
    """`_weights` on PyTorch, where no gradient is wanted; the logits become the weights."""
    import torch

    logits = soft_cap_of_own(logits, cap)
    return torch.softmax(logits.add_(hidden), dim=-1, out=logits)
