"""Grouped-query attention as a layer: projections, RoPE, and the keys and values that decoding caches."""

import keras
from keras import ops

from keras_t5gemma.config import StackConfig
from keras_t5gemma.kernels.attention.dispatch import attention
from keras_t5gemma.kernels.float16 import clip_to_range
from keras_t5gemma.layers.initialization import as_rows, dense
from keras_t5gemma.layers.rope import rotate


class Attention(keras.layers.Layer):
    """Multi-head attention whose `N` query heads share `K` key and value heads in groups of `G = N / K`.

    The same layer serves self-attention and cross-attention. In self-attention, keys come from the queries' sequence
    and have RoPE. In cross-attention, keys come from the encoder's output and have no RoPE.

    Args:
        config: the `StackConfig` of the stack that the queries belong to.
        **kwargs: `dtype` and `name`.
    """

    def __init__(self, config: StackConfig, **kwargs):
        # No autocast: RoPE's angles stay in float32.
        super().__init__(autocast=False, **kwargs)
        self.config = config
        heads, kv_heads, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
        self.query_dense = dense(heads * size, "query", config, self.dtype_policy)
        self.key_dense = dense(kv_heads * size, "key", config, self.dtype_policy)
        self.value_dense = dense(kv_heads * size, "value", config, self.dtype_policy)
        self.output_dense = dense(config.hidden_dim, "output", config, self.dtype_policy)

    def build(self, query_shape, source_shape):
        """Creates the kernels: query [D, N*H], key and value [width of the source, K*H], output [N*H, D]."""
        self.query_dense.build(query_shape)
        self.key_dense.build(source_shape)
        self.value_dense.build(source_shape)
        self.output_dense.build((*query_shape[:-1], self.query_dense.units))
        self.built = True

    def keys_values(self, source, angles=None):
        """Computes the keys and values of a sequence.

        Args:
            source: [B, S, D], the sequence that is attended to.
            angles: `rotary_angles` of its positions, or None in cross-attention.

        Returns:
            `{"key", "value"}`, each [B, K, S, H]. Decoding steps read this layout, so they need not transpose it.
        """
        rows = as_rows(source)
        key = self._split_heads(self.key_dense(rows), source)
        if angles is not None:
            key = rotate(key, angles)
        value = self._split_heads(self.value_dense(rows), source)
        return {name: ops.swapaxes(clip_to_range(x), 1, 2) for name, x in (("key", key), ("value", value))}

    def call(self, x, keys_values, visible, angles=None):
        """Computes attention.

        Args:
            x: input of the queries, [B, T, D].
            keys_values: the result of `keys_values()`, or a cache with its layout.
            visible: the keys that each query may see, bool [B, T, S] or a `BlockMask`; the result of `visible_keys()`.
            angles: `rotary_angles` of the queries' positions, or None in cross-attention.

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
        # Scaled before the product, so that the product stays in float16's range.
        query = ops.reshape(clip_to_range(query) * config.query_scale, grouped)
        cap, dtype = config.attention_soft_cap, self.compute_dtype
        attended = attention(query, keys_values["key"], keys_values["value"], visible, cap=cap, dtype=dtype)
        width = config.num_query_heads * config.head_dim
        output = self.output_dense(ops.reshape(attended, (-1, width)))
        return ops.reshape(output, (batch, length, config.hidden_dim))

    def _split_heads(self, rows, source):
        """Reshapes projections [B * T, N * H] of `source` [B, T, D] to [B, T, N, H]."""
        # The number of heads is explicit: with -1, it would be unknown if TensorFlow does not know the length.
        size = self.config.head_dim
        return ops.reshape(rows, (ops.shape(source)[0], ops.shape(source)[1], rows.shape[-1] // size, size))
