"""One block of a stack: self-attention, a decoder's cross-attention to the encoder's output, and a feed-forward."""

import keras

from keras_t5gemma.config import StackConfig
from keras_t5gemma.layers.attention import Attention
from keras_t5gemma.layers.cache import is_start, write
from keras_t5gemma.layers.feed_forward import FeedForward
from keras_t5gemma.layers.norm import RMSNorm


class Block(keras.layers.Layer):
    """Gemma 2's block. A decoder block has cross-attention between self-attention and feed-forward.

    Every sub-layer has a norm before it and another after it: `x + dropout(post_norm(sub_layer(pre_norm(x))))`.

    Args:
        config: the stack's `StackConfig`.
        encoder_dim: E, the encoder's width, for a block with cross-attention; otherwise None.
        **kwargs: `dtype` and `name`.
    """

    def __init__(self, config: StackConfig, encoder_dim: int | None = None, **kwargs):
        # No autocast: RoPE's angles stay in float32.
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.encoder_dim = encoder_dim

        def norm(name):
            return RMSNorm(config.norm_epsilon, dtype=self.dtype_policy, name=name)

        self.pre_self_attention_norm = norm("pre_self_attention_norm")
        self.self_attention = Attention(config, dtype=self.dtype_policy, name="self_attention")
        self.post_self_attention_norm = norm("post_self_attention_norm")
        if encoder_dim is not None:
            self.pre_cross_attention_norm = norm("pre_cross_attention_norm")
            self.cross_attention = Attention(config, dtype=self.dtype_policy, name="cross_attention")
            self.post_cross_attention_norm = norm("post_cross_attention_norm")
        self.pre_feed_forward_norm = norm("pre_feed_forward_norm")
        self.feed_forward = FeedForward(config, dtype=self.dtype_policy, name="feed_forward")
        self.post_feed_forward_norm = norm("post_feed_forward_norm")
        self.dropout = keras.layers.Dropout(config.dropout, dtype=self.dtype_policy, name="dropout")

    def build(self, input_shape):
        """Builds the sub-layers for inputs [B, T, D]."""
        self.self_attention.build(input_shape, input_shape)
        self.feed_forward.build(input_shape)
        norms = [
            self.pre_self_attention_norm,
            self.post_self_attention_norm,
            self.pre_feed_forward_norm,
            self.post_feed_forward_norm,
        ]
        if self.encoder_dim is not None:
            self.cross_attention.build(input_shape, (None, None, self.encoder_dim))
            norms += [self.pre_cross_attention_norm, self.post_cross_attention_norm]
        for norm in norms:
            norm.build(input_shape)
        self.built = True

    def call(
        self, x, visible, angles, encoder_output=None, encoder_visible=None, cache=None, index=None, training=None
    ):
        """Runs the block. If there is a cache, writes the new keys and values into it.

        Args:
            x: [B, T, D].
            visible: self-attention's mask, bool [B, T, S] or a `BlockMask`. S is T, or the number of the cache's slots
                if the cache is not empty.
            angles: `rotary_angles` of x's positions.
            encoder_output: [B, S, E]; None with a cache, or if there is no encoder.
            encoder_visible: cross-attention's mask; None if there is no encoder.
            cache: `{"self": {"key", "value"}, "cross": {"key", "value"}}`, or None.
            index: position of x's first token. For a single token: its slot in the cache, or a slot per row, int [B].
            training: whether dropout is on.

        Returns:
            `(x, cache)`: [B, T, D], and the updated cache or None.
        """
        normed = self.pre_self_attention_norm(x)
        keys_values = self.self_attention.keys_values(normed, angles)
        if cache is not None:
            written = {name: write(cache["self"][name], keys_values[name], index) for name in keys_values}
            cache = {"self": written, "cross": cache["cross"]}
            # The first tokens see only each other, however many slots the cache has.
            keys_values = keys_values if is_start(index) else written
        attended = self.self_attention(normed, keys_values, visible=visible, angles=angles)
        x = x + self.dropout(self.post_self_attention_norm(attended), training=training)
        if encoder_visible is not None:
            keys_values = self.cross_attention.keys_values(encoder_output) if cache is None else cache["cross"]
            attended = self.cross_attention(self.pre_cross_attention_norm(x), keys_values, visible=encoder_visible)
            x = x + self.dropout(self.post_cross_attention_norm(attended), training=training)
        transformed = self.feed_forward(self.pre_feed_forward_norm(x))
        return x + self.dropout(self.post_feed_forward_norm(transformed), training=training), cache
