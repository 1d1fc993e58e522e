"""Attention on PyTorch: in place if no gradient is needed, and in blocks that the backward pass recomputes."""

import functools

import keras
import torch

from keras_t5gemma.kernels.attention import query_blocks, reference
from keras_t5gemma.kernels.gradients import may_overwrite
from keras_t5gemma.kernels.soft_cap import soft_cap_in_place


def attend(query, key, value, visible, *, cap, dtype):
    """`reference.attend`; without gradients the weights overwrite the logits.

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
    if not may_overwrite():
        return reference.attend(query, key, value, visible, cap=cap, dtype=dtype)
    logits = soft_cap_in_place(reference.attention_logits(query, key), cap).add_(reference.attention_bias(visible))
    weights = torch.softmax(logits, dim=-1, out=logits)
    return reference.weighted_values(weights, value, visible, dtype)


def _loop(block, count, query, segments, key, value):
    """Runs `block` for each block of queries, as `attend_by_blocks` asks; the backward pass recomputes each block."""
    run = keras.remat(block) if torch.is_grad_enabled() else block
    return torch.stack([run(i, query[i], segments[i], key, value) for i in range(count)])


in_blocks = functools.partial(query_blocks.attend_by_blocks, _loop, attend)
