"""Attention by PyTorch's `flex_attention`, which PyTorch compiles for the mask and the cap. For NVIDIA's GPUs."""

import functools

# Further than any sequence is long.
_FAR = 2**30


def attend(query, key, value, mask, cap):
    """Values weighted by their keys, for a `BlockMask`: compiled on a GPU; uncompiled elsewhere, for tests."""
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


@functools.cache  # one function a cap: of a new one PyTorch would make a new program
def _capped(cap):
    import torch

    def score(logit, *_):
        return torch.tanh(logit / cap) * cap

    return score


def flex_mask(mask):
    """Which blocks of keys each block of queries sees; made once for all layers that share a mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    if "flex" not in mask.made:
        query_segments, key_segments = mask.query_segments, mask.key_segments
        device = key_segments.device
        (batch, queries), keys = query_segments.shape, key_segments.shape[1]
        places, behind, ahead = _reach(mask, batch, queries, device)

        def sees(b, _, q, k):
            distance = places[q] - k
            near = (distance <= behind[b]) & (distance >= ahead[b])
            return near & (query_segments[b, q] == key_segments[b, k]) & (key_segments[b, k] != 0)

        create = _compiled(create_block_mask) if key_segments.is_cuda else create_block_mask
        mask.made["flex"] = create(sees, batch, None, queries, keys, device=device)
    return mask.made["flex"]


def _reach(mask, batch, queries, device):
    """Places of the queries [T], and how far behind and ahead of its own one sees, each [B].

    Tensors, so that one program serves all kinds of masks: of a number PyTorch would make a new one, and after eight it
    compiles no more.
    """
    import torch

    far = _FAR if mask.window is None else mask.window - 1
    places = torch.arange(queries, device=device) + mask.query_start
    ahead = 0 if mask.causal else -far
    return places, *(torch.full((batch,), limit, device=device) for limit in (far, ahead))
