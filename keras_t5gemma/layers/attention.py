"""Grouped-query attention as a layer: projections and RoPE, and the keys and values a decoding step keeps."""

import keras
from keras import ops

from keras_t5gemma.kernels.attention.dispatch import attention
from keras_t5gemma.kernels.float16 import clip_to_range
from keras_t5gemma.layers.initialization import as_rows, dense
from keras_t5gemma.layers.rope import rotate


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
        return {name: ops.swapaxes(clip_to_range(x), 1, 2) for name, x in (("key", key), ("value", value))}

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
        query = ops.reshape(clip_to_range(query) * config.query_scale, grouped)
        cap, dtype = config.attention_soft_cap, self.compute_dtype
        attended = attention(query, keys_values["key"], keys_values["value"], visible, cap=cap, dtype=dtype)
        width = config.num_query_heads * config.head_dim
        output = self.output_dense(ops.reshape(attended, (-1, width)))
        return ops.reshape(output, (batch, length, config.hidden_dim))

    def _split_heads(self, rows, source):
        """Rows [B * T, N * H] of `source` [B, T, D] as [B, T, N, H]."""
        # Heads by number, not -1: beside a length that TensorFlow does not know they would be unknown, too.
        size = self.config.head_dim
        return ops.reshape(rows, (ops.shape(source)[0], ops.shape(source)[1], rows.shape[-1] // size, size))
