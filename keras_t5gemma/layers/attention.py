"""Grouped-query attention with soft caps, and the keys and values a decoding step keeps."""

import functools

import keras
import numpy as np
from keras import ops

from keras_t5gemma.layers.attention_blocks import in_blocks
from keras_t5gemma.layers.attention_kernels import has_kernel, kernel
from keras_t5gemma.layers.finite import finite
from keras_t5gemma.layers.masks import BlockMask
from keras_t5gemma.layers.weights import as_rows, dense

# Added to hidden logits before the softmax: far below any logit, and finite, so that a query that sees no key gives no
# NaN.
_HIDDEN = -1e30


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


def soft_cap(logits, cap):
    """`cap * tanh(logits / cap)`, or the logits themselves where `cap` is None."""
    return logits if cap is None else ops.tanh(logits / cap) * cap


def soft_cap_of_own(logits, cap):
    """`soft_cap` of logits that nobody else has: in place on PyTorch, where no gradient is wanted."""
    if cap is None or not _may_overwrite():
        return soft_cap(logits, cap)
    return logits.div_(cap).tanh_().mul_(cap)


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
    logits = ops.cast(finite(_products(query, key)), "float32")
    hidden = ops.where(ops.expand_dims(visible, (1, 2)), 0.0, _HIDDEN)
    weights = (_weights_in_place if _may_overwrite() else _weights)(logits, hidden, cap)
    # Heads come first in both products: XLA:CPU takes two to three times as long for others.
    attended = ops.transpose(_matmul(ops.cast(weights, dtype), value), (0, 3, 1, 2, 4))
    # A query that sees nothing has weighed all keys alike: make that the zeros it should be.
    sees = ops.reshape(ops.any(visible, axis=-1), (*ops.shape(attended)[:2], 1, 1, 1))
    return ops.where(sees, attended, 0.0)


def _products(query, key):
    """[B, K, G, T, S] of query [B, T, K, G, H] and key [B, K, S, H]."""
    if keras.config.backend() == "tensorflow" and keras.backend.standardize_dtype(key.dtype) == "float16":
        # With keys laid out so, TensorFlow's CPU kernel sums in float16, where infinities of both signs make NaN.
        return ops.einsum("btkgh,bskh->bkgts", query, ops.swapaxes(key, 1, 2))
    return _matmul(ops.transpose(query, (0, 2, 3, 1, 4)), ops.swapaxes(key, 2, 3))


def _matmul(left, right):
    """[B, K, G, T, N] of left [B, K, G, T, M] and right [B, K, M, N]: a product for each of K heads, groups as rows."""
    batch, heads, groups, length, size = ops.shape(left)
    product = ops.matmul(ops.reshape(left, (batch, heads, groups * length, size)), right)
    return ops.reshape(product, (batch, heads, groups, length, ops.shape(right)[3]))


def _weights(logits, hidden, cap):
    """The softmax of capped logits [B, K, G, T, S] and `hidden` [B, 1, 1, T, S], 0 where a key is visible."""
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


def attend_to(query, key, value, visible, *, cap, dtype):
    """`attend` to what is visible, bool or a `BlockMask`: at once, by a kernel, or in blocks."""
    weigh = functools.partial(attend, cap=cap, dtype=dtype)
    if not isinstance(visible, BlockMask):
        return weigh(query, key, value, visible)
    if has_kernel(dtype) and (fused := kernel(visible)) is not None:
        return fused(query, key, value, visible, cap)
    return in_blocks(weigh, query, key, value, visible)


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
        return ops.reshape(rows, (ops.shape(source)[0], ops.shape(source)[1], -1, self.config.head_dim))
