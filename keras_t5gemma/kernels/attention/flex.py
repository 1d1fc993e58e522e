"""Attention by PyTorch's `flex_attention`, which PyTorch compiles for the mask and the cap. For NVIDIA GPUs."""

import functools

# A distance longer than any sequence.
_FAR = 2**30


def attend(query, key, value, mask, cap):
    """Attention by `flex_attention`: compiled on a GPU, and uncompiled elsewhere for tests.

    Args:
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        mask: a `BlockMask`.
        cap: soft cap on the logits, or None.

    Returns:
        [B, T, K, G, H].
    """
    from torch.nn.attention.flex_attention import flex_attention

    batch, queries, kv_heads, groups, size = query.shape
    query = query.reshape(batch, queries, -1, size).transpose(1, 2)
    call = _compiled(flex_attention) if query.is_cuda else flex_attention
    score = None if cap is None else _capped(cap)
    options = {"score_mod": score, "block_mask": flex_mask(mask), "scale": 1.0, "enable_gqa": groups > 1}
    attended = call(query, key, value, **options)
    return attended.transpose(1, 2).reshape(batch, queries, kv_heads, groups, size)


@functools.cache
def _compiled(function):
    import torch

    return torch.compile(function)


@functools.cache  # one function per cap: PyTorch compiles a new program for each new function
def _capped(cap: float):
    import torch

    def score(logit, *_):
        return torch.tanh(logit / cap) * cap

    return score


def flex_mask(mask):
    """The `flex_attention` form of a `BlockMask`, built once for all layers that share the mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    if "flex" not in mask.kernel_masks:
        query_segments, key_segments = mask.query_segments, mask.key_segments
        device = key_segments.device
        (batch, queries), keys = query_segments.shape, key_segments.shape[1]
        positions, behind, ahead = _reach(mask, batch, queries, device)

        def sees(b, _, q, k):
            distance = positions[q] - k
            near = (distance <= behind[b]) & (distance >= ahead[b])
            return near & (query_segments[b, q] == key_segments[b, k]) & (key_segments[b, k] != 0)

        create = _compiled(create_block_mask) if key_segments.is_cuda else create_block_mask
        mask.kernel_masks["flex"] = create(sees, batch, None, queries, keys, device=device)
    return mask.kernel_masks["flex"]


def _reach(mask, batch, queries, device):
    """Positions of the queries [T], and how far behind and ahead of itself a query sees, each [B].

    These are tensors so that one program serves all kinds of masks. PyTorch would compile a new program for each new
    number, and stops compiling after eight.
    """
    import torch

    far = _FAR if mask.window is None else mask.window - 1
    positions = torch.arange(queries, device=device) + mask.query_start
    ahead = 0 if mask.causal else -far
    return positions, *(torch.full((batch,), limit, device=device) for limit in (far, ahead))
