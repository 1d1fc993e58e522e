"""The backbone: both stacks as one Keras model from token ids to hidden states."""

from collections.abc import Mapping

import keras

from keras_t5gemma import presets
from keras_t5gemma.checkpoints.sources import t5gemma_source
from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.layers import lora
from keras_t5gemma.models.stack_model import StackModel
from keras_t5gemma.models.stacks import Decoder, Encoder
from keras_t5gemma.suggestions import check_keywords

INPUT_NAMES = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaBackbone(StackModel):
    """T5Gemma without a head: two Gemma 2 stacks joined by cross-attention.

    The input is a dict of int32 tensors: `encoder_token_ids` and `encoder_padding_mask` [B, S], `decoder_token_ids` and
    `decoder_padding_mask` [B, T]. A padding mask is 0 at padding and 1 elsewhere. In rows packed from several examples
    it numbers them 1, 2, 3, ..., which keeps them apart in self- and cross-attention.

    The output is a dict: `encoder_sequence_output` [B, S, E] and `decoder_sequence_output` [B, T, D].

    Args:
        encoder: a size ("s", "b", "l", "ml", "xl", "2b", "9b"), a `StackConfig` or a dict of its fields.
        decoder: the same for the decoder; equal to the encoder if left out.
        vocabulary_size: V, rows of each stack's embedding table.
        final_logit_soft_cap: soft cap on output logits, or None; 30 in Gemma 2.
        encoder_attention: "bidirectional"; or "causal", an ablation in arXiv 2504.06225.
        tie_embeddings: whether the output projection is the decoder's embedding table.
        dtype: dtype policy, e.g. "bfloat16" or "mixed_bfloat16".
        **kwargs: `name`, `trainable`.

    Raises:
        ValueError: if a size is unknown or a value is out of range; the message names the argument.

    Example:
        >>> import keras_t5gemma as kt
        >>> backbone = kt.T5GemmaBackbone("9b", "2b")  # random weights
        >>> backbone = kt.T5GemmaBackbone.from_preset("t5gemma_9b_2b_ul2", dtype="bfloat16")
    """

    _open = staticmethod(t5gemma_source)

    def __init__(
        self,
        encoder: str | StackConfig | Mapping,
        decoder: str | StackConfig | Mapping | None = None,
        *,
        vocabulary_size: int = 256_000,
        final_logit_soft_cap: float | None = 30.0,
        encoder_attention: str = "bidirectional",
        tie_embeddings: bool = True,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs,
    ):
        check_keywords(T5GemmaBackbone, kwargs, ("name", "trainable"))
        config = T5GemmaConfig(
            encoder=presets.stack(encoder),
            decoder=presets.stack(encoder if decoder is None else decoder),
            vocabulary_size=vocabulary_size,
            final_logit_soft_cap=final_logit_soft_cap,
            encoder_attention=encoder_attention,
            tie_embeddings=tie_embeddings,
        )
        encoder_stack = Encoder(
            config.encoder,
            config.vocabulary_size,
            causal=config.encoder_attention == "causal",
            dtype=dtype,
            name="encoder",
        )
        decoder_stack = Decoder(
            config.decoder,
            config.vocabulary_size,
            causal=True,
            encoder_dim=config.encoder.hidden_dim,
            tie_embeddings=config.tie_embeddings,
            dtype=dtype,
            name="decoder",
        )
        inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in INPUT_NAMES}
        encoder_output = encoder_stack(inputs["encoder_token_ids"], inputs["encoder_padding_mask"])
        decoder_output = decoder_stack(
            inputs["decoder_token_ids"],
            inputs["decoder_padding_mask"],
            encoder_output,
            inputs["encoder_padding_mask"],
        )
        super().__init__(
            inputs=inputs,
            outputs={"encoder_sequence_output": encoder_output, "decoder_sequence_output": decoder_output},
            dtype=dtype,
            **kwargs,
        )
        self.config = config
        self.encoder = encoder_stack
        self.decoder = decoder_stack
        self.token_embedding = encoder_stack.token_embedding
        self.trainable_before_lora = []
        if not self.trainable:
            lora.set_trainable(self, [])  # Keras froze the model before it had weights

    @property
    def rematerialize(self) -> bool:
        """Whether training recomputes each block's activations in the backward pass instead of storing them.

        Activations then take the memory of one block, and of the input of each block. Training takes about a third more
        time. Losses and gradients are the same. The setting is not part of the saved architecture. As with `trainable`,
        compile a model again after a change if it has been trained already:

            lm.backbone.rematerialize = True
        """
        return self.decoder.rematerialize

    @rematerialize.setter
    def rematerialize(self, value: bool):
        self.encoder.rematerialize = self.decoder.rematerialize = bool(value)
