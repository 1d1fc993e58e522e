"""The backbone: both stacks as one Keras model from token ids to hidden states."""

import keras
import keras_hub

from keras_t5gemma import presets
from keras_t5gemma.checkpoints.files import read_json
from keras_t5gemma.checkpoints.load import load
from keras_t5gemma.checkpoints.sources import locate_t5gemma, t5gemma_source
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.models.distribution import layout_map
from keras_t5gemma.models.guarded import Guarded
from keras_t5gemma.models.stacks import Decoder, Encoder

INPUT_NAMES = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")


# Of our layers those that Keras quantizes; it warns of each of the others.
QUANTIZABLE = (keras.layers.Dense, keras.layers.Embedding)


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaBackbone(Guarded, keras_hub.models.Backbone):
    """T5Gemma without a head: two Gemma 2 stacks joined by cross-attention.

    Inputs, a dict of int32 tensors: `encoder_token_ids` and `encoder_padding_mask` [B, S], `decoder_token_ids` and
    `decoder_padding_mask` [B, T]. A padding mask is 0 at padding and 1 elsewhere; in rows packed from several examples
    it numbers them 1, 2, 3, ... and keeps them apart in self- and cross-attention.

    Outputs, a dict: `encoder_sequence_output` [B, S, D of the encoder], `decoder_sequence_output` [B, T, D].

    Args:
        encoder: a size ("s", "b", "l", "ml", "xl", "2b", "9b"), a `StackConfig` or a dict of its fields.
        decoder: likewise; the encoder's if left out.
        vocabulary_size: V, rows of each stack's embedding table.
        final_logit_soft_cap: soft cap on output logits, or None; 30 in Gemma 2.
        encoder_attention: "bidirectional", or "causal" (an ablation in arXiv 2504.06225).
        tie_embeddings: whether the output projection is the decoder's embedding table.
        dtype: dtype policy, e.g. "bfloat16" or "mixed_bfloat16".
        **kwargs: `name`, `trainable`.

    Raises:
        ValueError: for an unknown size or a value out of range; the message names the argument.

    Example:
        >>> import keras_t5gemma as kt
        >>> backbone = kt.T5GemmaBackbone("9b", "2b")  # random weights
        >>> backbone = kt.T5GemmaBackbone.from_preset("t5gemma_9b_2b_ul2", dtype="bfloat16")
    """

    presets = presets.PRESETS

    def __init__(
        self,
        encoder,
        decoder=None,
        *,
        vocabulary_size=256_000,
        final_logit_soft_cap=30.0,
        encoder_attention="bidirectional",
        tie_embeddings=True,
        dtype=None,
        **kwargs,
    ):
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

    @property
    def rematerialize(self):
        """Whether training computes each block's activations again in the backward pass rather than keep them.

        Memory for activations is then that of one block and of each block's input, at the price of about a third more
        time; losses and gradients are the same. Not part of the saved architecture. As with `trainable`, a model that
        has been trained already is to be compiled again after a change:

            lm.backbone.rematerialize = True
        """
        return self.decoder.rematerialize

    @rematerialize.setter
    def rematerialize(self, value):
        self.encoder.rematerialize = self.decoder.rematerialize = bool(value)

    def get_config(self):
        """The constructor's arguments, JSON-ready."""
        return {**super().get_config(), **self.config.to_dict()}

    @staticmethod
    def get_layout_map(device_mesh, model_parallel_dim_name="model", data_parallel_dim_name="batch", config=None):
        """The layouts of weights and activations on several devices, as keras-hub's backbones give them.

        Args:
            device_mesh: a `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: the axis of the mesh along which each layer is divided.
            data_parallel_dim_name: the one along which the batch is divided, and weights are too.
            config: the model's `T5GemmaConfig`, where sizes do not divide by the mesh. See `layout_map`.

        Returns:
            A `keras.distribution.LayoutMap`.

        Raises:
            ValueError: where the mesh is none, or has no axis for the batch.
        """
        return layout_map(device_mesh, config, data_axis=data_parallel_dim_name, model_axis=model_parallel_dim_name)

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """The backbone of a preset.

        Args:
            preset: a built-in name (`keras-t5gemma presets` lists them), "hf://owner/name", "kaggle://...", or a folder
                in Keras or Hugging Face format. keras-hub's own T5Gemma presets are read too.
            load_weights: False for the architecture with random weights.
            **kwargs: `dtype`, or what the class takes. "int8_from_bfloat16" and the like, Keras's names for a quantized
                policy, load in bfloat16 and quantize then, as `quantize("int8")` does; "int4/32_from_bfloat16" as
                `quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=32))` does.

        Raises:
            ValueError: where the preset is unknown, or is no T5Gemma.
            ConnectionError: where a download failed.
            CheckpointError: where the folder's tensors are not those of its config.
        """
        folder = locate_t5gemma(preset)
        saved = _saved_config(folder)
        if "Quantized" in str(saved.get("dtype")):
            return super().from_preset(str(folder), load_weights=load_weights, **kwargs)
        kwargs = {name: saved[name] for name in ("name", "trainable") if name in saved} | kwargs
        kwargs["dtype"], mode, config = _unquantized(kwargs.get("dtype"))
        source = t5gemma_source(folder)

        def make():
            return cls(**{**source.config.to_dict(), **kwargs})

        backbone = load(make, source.config, source.tensors) if load_weights else make()
        if mode is not None:
            backbone.quantize(mode, config=config, filters=lambda layer: isinstance(layer, QUANTIZABLE))
        return backbone


def _unquantized(dtype):
    """What a policy asks for, as `(dtype, mode, config)`.

    The policy to load in; the mode to quantize in then, or None; and a config where int4's size of blocks is given.
    """
    policy = None if dtype is None else keras.dtype_policies.get(dtype)
    mode = getattr(policy, "quantization_mode", None)
    if mode is None:
        return dtype, None, None
    config = None
    if isinstance(policy, keras.dtype_policies.Int4DTypePolicy):
        config = keras.quantizers.Int4QuantizationConfig(block_size=policy.block_size)
    return policy.name.partition("_from_")[2], mode, config


def _saved_config(folder):
    """The arguments that `save_to_preset` wrote; none for what another program wrote."""
    if not (folder / "config.json").is_file() or presets.is_hugging_face(folder):
        return {}
    saved = read_json(folder / "config.json")
    return saved["config"] if saved["registered_name"].startswith("keras_t5gemma>") else {}
