"""One block of a stack: attention to itself, in a decoder to the encoder's output, and a feed-forward."""

import keras

from keras_t5gemma.layers.attention import Attention
from keras_t5gemma.layers.cache import is_start, write
from keras_t5gemma.layers.feed_forward import FeedForward
from keras_t5gemma.layers.norm import RMSNorm


class Block(keras.layers.Layer):
    """Gemma 2's block, with cross-attention in between where it belongs to a decoder.

    Every sub-layer stands between a norm of its input and a norm of its output:
    `x + dropout(post_norm(sub_layer(pre_norm(x))))`.

    Args:
        config: the stack's `StackConfig`.
        encoder_dim: the encoder's width where the block has cross-attention, else None.
    """

    def __init__(self, config, encoder_dim=None, **kwargs):
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
        """Runs the block, and with a cache writes this call's keys and values into it.

        Args:
            x: [B, T, D].
            visible: who sees whom in self-attention, bool [B, T, S] or a `BlockMask`; S is T, or the cache's places,
                where it is not empty.
            angles: `rotary_angles` of x's positions.
            encoder_output: [B, S, D] of the encoder; None with a cache, or if there is no encoder.
            encoder_visible: who sees whom in cross-attention; None if there is no encoder.
            cache: `{"self": {"key", "value"}, "cross": {"key", "value"}}`, or None.
            index: position of x's first token, or of a single one its place in the cache.
            training: whether dropout is on.

        Returns:
            `(x, cache)`: [B, T, D] and the updated cache, or None.
        """
        normed = self.pre_self_attention_norm(x)
        keys_values = self.self_attention.keys_values(normed, angles)
        if cache is not None:
            written = {name: write(cache["self"][name], keys_values[name], index) for name in keys_values}
            cache = {"self": written, "cross": cache["cross"]}
            # The first tokens see each other alone, whatever room there is for others.
            keys_values = keys_values if is_start(index) else written
        attended = self.self_attention(normed, keys_values, visible=visible, angles=angles)
        x = x + self.dropout(self.post_self_attention_norm(attended), training=training)
        if encoder_visible is not None:
            keys_values = self.cross_attention.keys_values(encoder_output) if cache is None else cache["cross"]
            attended = self.cross_attention(self.pre_cross_attention_norm(x), keys_values, visible=encoder_visible)
            x = x + self.dropout(self.post_cross_attention_norm(attended), training=training)
        transformed = self.feed_forward(self.pre_feed_forward_norm(x))
        return x + self.dropout(self.post_feed_forward_norm(transformed), training=training), cache
