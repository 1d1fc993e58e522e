"""Attention by a kernel of the accelerator's library: no logits in memory, and the speed that it was tuned for.

    TPU, JAX           splash attention, which comes with JAX; padding and packing are its segment ids
    NVIDIA GPU, torch  `flex_attention`, which PyTorch compiles for the mask and the cap

Both have soft caps, gradients and grouped heads, and leave out what a window hides. They serve long sequences in
bfloat16 and float16; the rest attends plainly or in blocks, which are their oracle. On NVIDIA's GPUs JAX has none:
cuDNN has no soft cap, and of Tokamax's what ran was slower than what XLA makes of the plain one
(benchmarks/RESULTS.md).
"""

import functools
import math

import keras
from keras import ops

from keras_t5gemma.kernels.attention.masks import attention_mask

# Of splash attention: lengths and head sizes are filled up to a multiple of this.
_LANES = 128
# Of splash attention, too: queries and keys in a block, where they divide by it. JAX has 128, untuned by its own words;
# this is MaxText's default (`sa_block_q` and so on in its base.yml).
_BLOCK = 512
# Further than any sequence is long.
_FAR = 2**30
# TPUs have no float16.
_DTYPES = {"splash": ("bfloat16",), "flex": ("bfloat16", "float16")}


def has_kernel(dtype):
    """Whether this machine and backend have one for a compute dtype."""
    return dtype in _DTYPES.get(_name(), ())


def kernel(mask):
    """`(query, key, value, mask, cap) -> [B, T, K, G, H]` for a `BlockMask`, or None where no kernel serves it.

    Shapes are those of `attention.attend`, and so are the numbers, but for the order of sums.
    """
    name = _name()
    # Splash attention's mask is made before it runs: queries must not begin at a position that is known only then.
    if name is None or (name == "splash" and not _from_the_start(mask)):
        return None
    return {"splash": splash, "flex": flex}[name]


def _from_the_start(mask):
    return isinstance(mask.query_start, int) and mask.query_start == 0


@functools.cache
def _name():
    return {"jax": _name_on_jax, "torch": _name_on_torch}.get(keras.config.backend(), lambda: None)()


def _name_on_jax():
    import jax

    return "splash" if jax.default_backend() == "tpu" else None


def _name_on_torch():
    import torch

    return "flex" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else None


def flex(query, key, value, mask, cap):
    """PyTorch's `flex_attention`: compiled on a GPU; elsewhere, where it is for tests alone, as it is."""
    from torch.nn.attention.flex_attention import flex_attention

    batch, queries, kv_heads, groups, size = query.shape
    query = query.reshape(batch, queries, -1, size).transpose(1, 2)
    call = _compiled(flex_attention) if query.is_cuda else flex_attention
    score = None if cap is None else _capped(cap)
    options = {"score_mod": score, "block_mask": _flex_mask(mask), "scale": 1.0, "enable_gqa": groups > 1}
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


def _flex_mask(mask):
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


def splash(query, key, value, mask, cap, interpret=False):
    """Splash attention; `interpret` runs it on any machine, for tests."""
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    batch, queries, kv_heads, groups, size = query.shape
    keys = key.shape[2]
    padded = tuple(-(-length // _LANES) * _LANES for length in (queries, keys))
    if mask.window is not None:
        reach = (mask.window - 1, 0 if mask.causal else mask.window - 1)
        shape = splash_attention_mask.LocalMask(padded, reach, offset=0)
    else:
        shape = (splash_attention_mask.CausalMask if mask.causal else splash_attention_mask.FullMask)(padded)

    def fill(x, length):
        """[B, heads, length, H], filled up with zeros."""
        return ops.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, -size % _LANES)))

    def attend(query, key, value, query_segments, key_segments):
        # A padded query sees nothing: no key has its id.
        ids = [query_segments, ops.where(key_segments == 0, -1, key_segments)]
        ids = [
            ops.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=nobody)
            for x, length, nobody in zip(ids, padded, (0, -1), strict=True)
        ]
        run = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([shape] * query.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=cap,
            block_sizes=splash_attention_kernel.BlockSizes(**_block_sizes(*padded)),
            interpret=interpret,
        )
        arrays = (fill(ops.swapaxes(query, 1, 2), padded[0]), fill(key, padded[1]), fill(value, padded[1]))
        attended = jax.vmap(run)(*arrays, splash_attention_kernel.SegmentIds(*ids))
        return ops.swapaxes(attended, 1, 2)[:, :queries, :, :size]

    query = ops.reshape(query, (batch, queries, kv_heads * groups, size))
    attended = _on_each_device(attend, query, key, value, mask)
    return _without_the_blind(ops.reshape(attended, (batch, queries, kv_heads, groups, size)), mask)


def _block_sizes(queries, keys):
    """Of each of splash attention's three kernels: the forward pass, the gradients of keys and values, of queries."""
    q, kv = math.gcd(queries, _BLOCK), math.gcd(keys, _BLOCK)
    names = {"block_q": q, "block_kv": kv, "block_kv_compute": kv, "block_q_dkv": q, "block_kv_dkv": kv}
    return names | {"block_kv_dkv_compute": kv, "block_q_dq": q, "block_kv_dq": kv}


def _on_each_device(attend, query, key, value, mask):
    """`attend` for the part of the batch, and of the heads, that a device holds: XLA does not divide a kernel."""
    arrays = query, key, value, mask.query_segments, mask.key_segments
    distribution = keras.distribution.distribution()
    if distribution is None:
        return attend(*arrays)
    import jax
    from jax.sharding import PartitionSpec

    mesh = distribution.device_mesh
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    # As `models.sharding.layout_map` cuts heads: along the mesh's other axis, where they divide by it.
    batch, kv_heads = distribution.batch_dim_name, key.shape[1]
    other = next((name for name in sizes if name != batch and kv_heads % sizes[name] == 0), None)
    queries, keys, rows = (PartitionSpec(*axes) for axes in ((batch, None, other), (batch, other), (batch,)))
    specs = (queries, keys, keys, rows, rows)
    mapped = jax.shard_map(attend, mesh=mesh.backend_mesh, in_specs=specs, out_specs=queries, check_vma=False)
    return mapped(*arrays)


def _without_the_blind(attended, mask):
    """Zeros for a query that sees no key, of which splash attention makes a mean of what is hidden."""
    kind = {"causal": mask.causal, "window": mask.window}
    sees = ops.any(attention_mask(mask.query_segments, mask.key_segments, **kind), axis=2)
    return ops.where(ops.expand_dims(sees, (2, 3, 4)), attended, ops.zeros((), attended.dtype))
