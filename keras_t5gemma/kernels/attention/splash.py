"""Attention by splash attention, a TPU kernel that comes with JAX. Padding and packing become its segment ids."""

import math

import keras
from keras import ops

from keras_t5gemma.kernels.attention.masks import attention_mask

# Lengths and head sizes are padded to a multiple of this.
_LANES = 128
# Queries and keys per block, if the lengths divide by it. JAX's default is 128, untuned by its own words. This is
# MaxText's default (`sa_block_q` and so on in its base.yml).
_BLOCK = 512


def attend(query, key, value, mask, cap, interpret: bool = False):
    """Splash attention.

    Args:
        query: [B, T, K, G, H], scaled.
        key: [B, K, S, H].
        value: [B, K, S, H].
        mask: a `BlockMask` whose first query is at position 0.
        cap: soft cap on the logits, or None.
        interpret: whether to interpret the kernel, which runs it on any machine, for tests.

    Returns:
        [B, T, K, G, H]; zeros for a query that sees no key.
    """
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
        """[B, heads, length, H], padded with zeros."""
        return ops.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, -size % _LANES)))

    def on_device(query, key, value, query_segments, key_segments):
        # A padded query sees nothing: no key has its id.
        ids = [query_segments, ops.where(key_segments == 0, -1, key_segments)]
        ids = [
            ops.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=padding_id)
            for x, length, padding_id in zip(ids, padded, (0, -1), strict=True)
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
    attended = _on_each_device(on_device, query, key, value, mask)
    return _zero_if_no_key(ops.reshape(attended, (batch, queries, kv_heads, groups, size)), mask)


def _block_sizes(queries: int, keys: int) -> dict[str, int]:
    """The block sizes of the three kernels: forward pass, gradients of keys and values, gradients of queries."""
    q, kv = math.gcd(queries, _BLOCK), math.gcd(keys, _BLOCK)
    names = {"block_q": q, "block_kv": kv, "block_kv_compute": kv, "block_q_dkv": q, "block_kv_dkv": kv}
    return names | {"block_kv_dkv_compute": kv, "block_q_dq": q, "block_kv_dq": kv}


def _on_each_device(on_device, query, key, value, mask):
    """Calls `on_device` with each device's part of the batch and of the heads: XLA does not partition a kernel."""
    arrays = query, key, value, mask.query_segments, mask.key_segments
    distribution = keras.distribution.distribution()
    if distribution is None:
        return on_device(*arrays)
    import jax
    from jax.sharding import PartitionSpec

    mesh = distribution.device_mesh
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    # Heads are divided as in `models.sharding.layout_map`: along the mesh's other axis, if they divide by it.
    batch, kv_heads = distribution.batch_dim_name, key.shape[1]
    heads = next((name for name in sizes if name != batch and kv_heads % sizes[name] == 0), None)
    queries, keys, rows = (PartitionSpec(*axes) for axes in ((batch, None, heads), (batch, heads), (batch,)))
    specs = (queries, keys, keys, rows, rows)
    mapped = jax.shard_map(on_device, mesh=mesh.backend_mesh, in_specs=specs, out_specs=queries, check_vma=False)
    return mapped(*arrays)


def _zero_if_no_key(attended, mask):
    """Zeros for queries that see no key: splash attention returns a mean of hidden values for them."""
    kind = {"causal": mask.causal, "window": mask.window}
    sees = ops.any(attention_mask(mask.query_segments, mask.key_segments, **kind), axis=2)
    return ops.where(ops.expand_dims(sees, (2, 3, 4)), attended, ops.zeros((), attended.dtype))
