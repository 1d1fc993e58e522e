"""The two stacks: the package's only forward pass, the same in training, in prefill and in a cached step."""

import keras
from keras import ops

from keras_t5gemma.config import StackConfig
from keras_t5gemma.kernels.attention.dispatch import has_kernel
from keras_t5gemma.kernels.attention.masks import attention_mask, visible_keys
from keras_t5gemma.kernels.barriers import materialized, with_gradients_summed_early
from keras_t5gemma.kernels.cache_update import is_per_row, write_at
from keras_t5gemma.kernels.embedding.lookup import look_up
from keras_t5gemma.kernels.rematerialization import rematerialized
from keras_t5gemma.layers.block import Block
from keras_t5gemma.layers.cache import cache_slots, is_start, positions, slot_of
from keras_t5gemma.layers.copies import part_of_a_model
from keras_t5gemma.layers.initialization import embedding
from keras_t5gemma.layers.norm import RMSNorm
from keras_t5gemma.layers.rope import rotary_angles


class Stack(keras.layers.Layer):
    """The base class of encoder and decoder: embeds token ids, runs the blocks, and applies a final norm.

    Args:
        config: the stack's `StackConfig`.
        vocabulary_size: V, rows of the embedding table.
        causal: whether self-attention hides later positions.
        encoder_dim: E, the encoder's width, if the blocks have cross-attention; otherwise None.
        tie_embeddings: whether the table is the output projection too. False adds a separate projection.
        **kwargs: `dtype` and `name`.
    """

    def __init__(
        self,
        config: StackConfig,
        vocabulary_size: int,
        *,
        causal: bool,
        encoder_dim: int | None = None,
        tie_embeddings: bool = True,
        **kwargs,
    ):
        # No autocast: RoPE's angles stay in float32.
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.causal = causal
        self.rematerialize = False  # see `T5GemmaBackbone.rematerialize`
        self.projects = tie_embeddings and encoder_dim is not None  # an encoder has no output projection
        self.token_embedding = embedding(
            vocabulary_size, "token_embedding", config, self.dtype_policy, tied=tie_embeddings
        )
        self.dropout = keras.layers.Dropout(config.dropout, dtype=self.dtype_policy, name="dropout")
        self.blocks = [
            Block(config, encoder_dim, dtype=self.dtype_policy, name=f"layer_{i}") for i in range(config.num_layers)
        ]
        self.final_norm = RMSNorm(config.norm_epsilon, dtype=self.dtype_policy, name="final_norm")

    def get_config(self):
        """Raises an error: the model's config contains the configs of its stacks."""
        raise part_of_a_model(self)

    def build(self, input_shape=None):
        """Builds every layer; all sizes come from the config."""
        hidden_shape = (None, None, self.config.hidden_dim)
        self.token_embedding.build(input_shape)
        for block in self.blocks:
            block.build(hidden_shape)
        self.final_norm.build(hidden_shape)
        self.built = True

    def run(
        self, token_ids, key_segments, query_segments, *, start=0, encoder=(None, None), caches=None, training=None
    ):
        """The forward pass.

        Args:
            token_ids: int [B, T].
            key_segments: int [B, S], segment ids of the keys' positions: those of the tokens, or of a cache.
            query_segments: int [B, T], segment ids of the tokens.
            start: position of the first token among the keys; an int, a scalar tensor, or a position per row, int [B].
            encoder: for a decoder, `(encoder_output, encoder_visible)` of `Block.call`.
            caches: one cache per block, or None.
            training: whether dropout is on.

        Returns:
            `(x, caches)`: [B, T, D] after the final norm, and the updated caches.
        """
        config = self.config
        if caches is not None and is_start(start):
            key_segments = query_segments  # the first tokens see only each other, see `Block.call`
        masks, indices = {}, {}
        for i, kind in enumerate(config.layer_kinds):
            if kind not in masks:
                slots = None if caches is None or is_start(start) else caches[i]["self"]["key"].shape[2]
                masks[kind] = self._visible(kind, query_segments, key_segments, start, slots)
                indices[kind] = start if slots is None or query_segments.shape[1] > 1 else slot_of(start, slots)
        angles = rotary_angles(ops.shape(token_ids)[1], start, config.head_dim, config.rope_wavelength)
        x = ops.cast(look_up(self.token_embedding, token_ids, only_gradient=not self.projects), self.compute_dtype)
        # Gemma rounds the factor to the compute dtype: sqrt(3584) is 59.867 in float32, 59.75 in bfloat16.
        x = x * ops.cast(config.hidden_dim**0.5, x.dtype)
        x = self.dropout(x, training=training)
        updated = []
        for i, (block, kind) in enumerate(zip(self.blocks, config.layer_kinds, strict=True)):
            cache = None if caches is None else caches[i]
            if encoder[0] is not None and training:
                encoder = (with_gradients_summed_early(encoder[0]), encoder[1])
            if self.rematerialize and training and cache is None:
                x = _rematerialized(block, x, masks[kind], angles, encoder)
            else:
                x, cache = block(
                    x,
                    visible=masks[kind],
                    angles=angles,
                    encoder_output=encoder[0],
                    encoder_visible=encoder[1],
                    cache=cache,
                    index=indices[kind],
                    training=training,
                )
            updated.append(cache)
        return self.final_norm(x), updated

    def _visible(self, kind, query_segments, key_segments, start, slots):
        """Self-attention's mask for one kind of layer.

        Args:
            kind: "sliding" or "global".
            query_segments: int [B, T].
            key_segments: int [B, S].
            start: position of the first query, or one per row.
            slots: the number of slots of the layers' caches, or None without a cache.

        Returns:
            bool [B, T, S] or [B, T, slots], or a `BlockMask`.
        """
        config = self.config
        options = {"query_start": start, "causal": self.causal, "window": self._window(kind)}
        if slots is None or slots == key_segments.shape[1]:
            fused = has_kernel(self.compute_dtype)
            return visible_keys(config.num_query_heads, query_segments, key_segments, fused=fused, **options)
        slot_positions = positions(slots, start + query_segments.shape[1] - 1)
        take = ops.take_along_axis if is_per_row(start) else ops.take
        segments = take(key_segments, ops.maximum(slot_positions, 0), axis=1)
        segments = ops.where(slot_positions < 0, 0, segments)
        return attention_mask(query_segments, segments, key_positions=slot_positions, **options)

    def _window(self, kind: str) -> int | None:
        return self.config.sliding_window if kind == "sliding" else None


def _rematerialized(block, x, visible, angles, encoder):
    """Runs a block in training without storing its activations. Arguments as in `Block.call`; returns [B, T, D]."""

    def call(x, output=None):
        return block(
            x, visible=visible, angles=angles, encoder_output=output, encoder_visible=encoder[1], training=True
        )[0]

    return rematerialized(call, block, x, *(() if encoder[0] is None else encoder[:1]))


class Encoder(Stack):
    """The encoder: self-attention over the whole input, in both directions unless `causal`."""

    def call(self, token_ids, padding_mask, training=None):
        """Encodes token ids.

        Args:
            token_ids: int [B, S].
            padding_mask: int [B, S], 0 at padding, otherwise the segment id (1 if there is one example per row).
            training: whether dropout is on.

        Returns:
            [B, S, D].
        """
        segments = ops.cast(padding_mask, "int32")
        x, _ = self.run(token_ids, segments, segments, training=training)
        return x

    def compute_output_shape(self, token_ids_shape, **_):
        """[B, S, D]."""
        return (*token_ids_shape, self.config.hidden_dim)


class Decoder(Stack):
    """The decoder: causal self-attention, and cross-attention to the encoder's whole output."""

    def call(self, token_ids, padding_mask, encoder_output, encoder_padding_mask, training=None):
        """Decodes a whole sequence at once.

        Args:
            token_ids: int [B, T].
            padding_mask: int [B, T], 0 at padding, otherwise the segment id.
            encoder_output: [B, S, E].
            encoder_padding_mask: int [B, S]; a decoder position sees the encoder positions of its own segment.
            training: whether dropout is on.

        Returns:
            [B, T, D].
        """
        segments = ops.cast(padding_mask, "int32")
        encoder_segments = ops.cast(encoder_padding_mask, "int32")
        encoder = (encoder_output, self._visible_encoder(segments, encoder_segments))
        x, _ = self.run(token_ids, segments, segments, encoder=encoder, training=training)
        return x

    def compute_output_shape(self, token_ids_shape, **_):
        """[B, T, D]."""
        return (*token_ids_shape, self.config.hidden_dim)

    def start_cache(self, encoder_output, encoder_padding_mask, length: int, ahead: int | None = None):
        """Creates a cache that is empty except for the keys and values of cross-attention, which never change.

        Args:
            encoder_output: [B, S, E].
            encoder_padding_mask: int [B, S].
            length: L, the longest sequence that the cache can hold.
            ahead: the most tokens per step; None for any number. If it is given, sliding layers keep R = window + ahead
                positions, or L if that is smaller.

        Returns:
            A nested structure of tensors. The batch is the first axis of each, so that beam search can reorder them:
            `layers`, one `{"self": {"key", "value"}, "cross": {"key", "value"}}` per block ([B, K, R, H] and
            [B, K, S, H]); `segments` [B, L], segment ids of the positions so far; `encoder_segments` [B, S].
        """
        config, batch = self.config, ops.shape(encoder_output)[0]

        def empty(kind):
            slots = cache_slots(length, self._window(kind), length if ahead is None else max(1, ahead))
            shape = (batch, config.num_key_value_heads, slots, config.head_dim)
            return {name: ops.zeros(shape, dtype=self.compute_dtype) for name in ("key", "value")}

        return {
            "layers": [
                {"self": empty(kind), "cross": materialized(block.cross_attention.keys_values(encoder_output))}
                for block, kind in zip(self.blocks, config.layer_kinds, strict=True)
            ],
            "segments": ops.zeros((batch, length), dtype="int32"),
            "encoder_segments": ops.cast(encoder_padding_mask, "int32"),
        }

    def step(self, token_ids, padding_mask, cache, index):
        """Decodes the next tokens, one or a whole prompt, after the tokens in the cache.

        Args:
            token_ids: int [B, T].
            padding_mask: int [B, T], as in `call`.
            cache: from `start_cache` or an earlier step.
            index: position of the first token; an int, a scalar tensor, or, for single tokens, a position per row,
                int [B].

        Returns:
            `(x, cache)`: [B, T, D], equal to the output of `call` at these positions, and the updated cache.

        Raises:
            ValueError: if there is a position per row and several tokens.
        """
        if is_per_row(index) and token_ids.shape[1] != 1:
            raise ValueError(
                f"With an `index` per row a step takes one token per row. Received: {token_ids.shape[1]} tokens."
            )
        segments = ops.cast(padding_mask, "int32")
        key_segments = write_at(cache["segments"], segments, index)
        encoder = (None, self._visible_encoder(segments, cache["encoder_segments"]))
        x, layers = self.run(
            token_ids, key_segments, segments, start=index, encoder=encoder, caches=cache["layers"], training=False
        )
        return x, {**cache, "layers": layers, "segments": key_segments}

    def _visible_encoder(self, segments, encoder_segments):
        """Cross-attention's mask for segment ids [B, T] and [B, S]."""
        heads, fused = self.config.num_query_heads, has_kernel(self.compute_dtype)
        return visible_keys(heads, segments, encoder_segments, fused=fused)
