"""Grouped-query attention as a layer: projections and RoPE, and the keys and values a decoding step keeps."""

import keras
import numpy as np
from keras import ops

from keras_t5gemma.kernels.attention.accelerators import has_kernel, kernel
from keras_t5gemma.kernels.attention.blocks import in_blocks
from keras_t5gemma.kernels.attention.masks import BlockMask
from keras_t5gemma.kernels.attention.reference import attend
from keras_t5gemma.kernels.float16 import finite
from keras_t5gemma.layers.initialization import as_rows, dense


def rotary_angles(length, start, head_dim, wavelength):
    """Cosines and sines of RoPE (arXiv 2104.09864) for consecutive positions.

    Args:
        length: T, how many positions.
        start: the first position; an int, or a scalar tensor in a decoding step.
        head_dim: H.
        wavelength: the base of the frequencies, 10,000 in Gemma 2.

    Returns:
        A pair of float32 [T, 1, H / 2], ready to multiply [B, T, heads, H / 2].
    """
    frequencies = wavelength ** -(np.arange(0, head_dim, 2, dtype="float32") / head_dim)
    positions = ops.cast(ops.add(ops.arange(length, dtype="int32"), start), "float32")
    angles = ops.reshape(positions, (-1, 1, 1)) * ops.convert_to_tensor(frequencies, dtype="float32")
    return ops.cos(angles), ops.sin(angles)


def rotate(x, angles):
    """Rotates the halves of each head of x [B, T, heads, H] by `rotary_angles`, in float32."""
    cos, sin = angles
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    rotated = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return ops.cast(rotated, x.dtype)


def write_at(buffer, update, index, axis=1):
    """Puts `update` into `buffer`, which is longer along `axis`, from position `index` on."""
    if keras.config.backend() == "torch":
        import torch

        # Keras's slice_update clones the whole buffer on PyTorch; compiled backends update in place by themselves.
        if not torch.is_grad_enabled() and buffer.device.type != "meta":
            buffer = buffer.contiguous()  # a sampler may have repeated a batch of one without giving it memory
            # By a tensor of places, since a slice would have to wait for the device to know the index.
            places = torch.arange(update.shape[axis], device=buffer.device) + index
            return buffer.index_copy_(axis, places, update)
    start = [0] * len(buffer.shape)
    start[axis] = index
    return ops.slice_update(buffer, start, update)


def attend_to(query, key, value, visible, *, cap, dtype):
    """`attend` to what is visible, bool or a `BlockMask`: at once, by a kernel, or in blocks."""
    if not isinstance(visible, BlockMask):
        if keras.config.backend() == "jax":
            from keras_t5gemma.kernels.attention import jax as attention_jax

            return attention_jax.attend(query, key, value, visible, cap=cap, dtype=dtype)
        return attend(query, key, value, visible, cap=cap, dtype=dtype)
    if has_kernel(dtype) and (fused := kernel(visible)) is not None:
        return fused(query, key, value, visible, cap)
    return in_blocks(query, key, value, visible, cap=cap, dtype=dtype)


class Attention(keras.layers.Layer):
    """Multi-head attention whose `N` query heads share `K` key and value heads in groups of `G = N / K`.

    The same layer serves self-attention (keys from the queries' own sequence, with RoPE) and cross-attention (keys
    from the encoder's output, without).

    Args:
        config: the `StackConfig` of the stack the queries belong to.
    """

    def __init__(self, config, **kwargs):
        # No autocast: RoPE's angles stay in float32.
        super().__init__(autocast=False, **kwargs)
        self.config = config
        heads, kv_heads, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
        self.query_dense = dense(heads * size, "query", config, self.dtype_policy)
        self.key_dense = dense(kv_heads * size, "key", config, self.dtype_policy)
        self.value_dense = dense(kv_heads * size, "value", config, self.dtype_policy)
        self.output_dense = dense(config.hidden_dim, "output", config, self.dtype_policy)

    def build(self, query_shape, source_shape):
        """Creates the kernels: query [D, N*H], key and value [D of the source, K*H], output [N*H, D]."""
        self.query_dense.build(query_shape)
        self.key_dense.build(source_shape)
        self.value_dense.build(source_shape)
        self.output_dense.build((*query_shape[:-1], self.query_dense.units))
        self.built = True

    def keys_values(self, source, angles=None):
        """Keys and values of `source`.

        Args:
            source: [B, S, D] of the sequence attended to.
            angles: its `rotary_angles`, or None in cross-attention.

        Returns:
            `{"key", "value"}`, each [B, K, S, H]: as a decoding step reads them, which would else turn them each time.
        """
        rows = as_rows(source)
        key = self._split_heads(self.key_dense(rows), source)
        if angles is not None:
            key = rotate(key, angles)
        value = self._split_heads(self.value_dense(rows), source)
        return {name: ops.swapaxes(finite(x), 1, 2) for name, x in (("key", key), ("value", value))}

    def call(self, x, keys_values, visible, angles=None):
        """Attends.

        Args:
            x: queries' input [B, T, D].
            keys_values: what `keys_values()` gave, or a cache of it.
            visible: which keys each query may see, bool [B, T, S] or a `BlockMask`: what `visible_keys()` gave.
            angles: the queries' `rotary_angles`, or None in cross-attention.

        Returns:
            [B, T, D]; zeros for a query that sees no key.
        """
        config = self.config
        query = self._split_heads(self.query_dense(as_rows(x)), x)
        if angles is not None:
            query = rotate(query, angles)
        batch, length = ops.shape(x)[0], ops.shape(x)[1]
        groups = config.num_query_heads // config.num_key_value_heads
        grouped = (batch, length, config.num_key_value_heads, groups, config.head_dim)
        # Scaled before the product, so that float16 has its range for it.
        query = ops.reshape(finite(query) * config.query_scale, grouped)
        cap, dtype = config.attention_soft_cap, self.compute_dtype
        attended = attend_to(query, keys_values["key"], keys_values["value"], visible, cap=cap, dtype=dtype)
        width = config.num_query_heads * config.head_dim
        output = self.output_dense(ops.reshape(attended, (-1, width)))
        return ops.reshape(output, (batch, length, config.hidden_dim))

    def _split_heads(self, rows, source):
        """Rows [B * T, N * H] of `source` [B, T, D] as [B, T, N, H]."""
        # Heads by number, not -1: beside a length that TensorFlow does not know they would be unknown, too.
        size = self.config.head_dim
        return ops.reshape(rows, (ops.shape(source)[0], ops.shape(source)[1], rows.shape[-1] // size, size))
