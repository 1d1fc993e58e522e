"""The backbone: both stacks as one Keras model from token ids to hidden states."""

import contextlib

import h5py
import keras
import keras_hub

from keras_t5gemma import presets
from keras_t5gemma._keras_internals import flatten_layers
from keras_t5gemma.checkpoints.hugging_face.reader import read_json
from keras_t5gemma.checkpoints.load import load
from keras_t5gemma.checkpoints.sources import locate_t5gemma, t5gemma_source
from keras_t5gemma.config import T5GemmaConfig
from keras_t5gemma.layers import lora
from keras_t5gemma.layers.initialization import weights_from
from keras_t5gemma.models.guarded import Guarded
from keras_t5gemma.models.quantization import Quantizes, quantize, unquantized
from keras_t5gemma.models.saved_state import backbone_from_config, state_config
from keras_t5gemma.models.sharding import layout_map
from keras_t5gemma.models.stacks import Decoder, Encoder

INPUT_NAMES = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaBackbone(Guarded, Quantizes, keras_hub.models.Backbone):
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
        if unknown := sorted(set(kwargs) - {"name", "trainable"}):  # Keras would take them without a word
            raise TypeError(f"T5GemmaBackbone got an unexpected keyword argument {unknown[0]!r}.")
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
            lora.set_trainable(self, [])  # Keras froze it before there were weights

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

    def default_lora_layer_names(self):
        """The names of the layers that `enable_lora` takes by default: each attention's queries and values."""
        return ["query", "value"]

    def enable_lora(self, rank, target_layer_names=None, *, lora_alpha=None):
        """Adds LoRA (arXiv 2106.09685) to some layers and freezes everything else.

            backbone.enable_lora(8)  # queries and values of each attention
            backbone.enable_lora(8, "decoder/*/cross_attention/*")
            backbone.enable_lora(8, ["query", "key", "value", "output", "gate", "up", "down"])
            backbone.enable_lora({"decoder/layer_2[0-5]/*": 16, "encoder/*": 4})

        Args:
            rank: the products' rank, or a dict of targets and their ranks; a layer's is that of the first that matches.
            target_layer_names: the targets: layers' names ("query"), paths ("decoder/layer_0/self_attention/query"), or
                patterns of paths, in which `*` stands for anything. Patterns match no table of embeddings, which is
                meant only by its own name or path.
            lora_alpha: LoRA's product is multiplied by `lora_alpha / rank`; None for a factor of 1.

        Raises:
            ValueError: if a target matches no layer, a rank is not a positive integer, or the model has LoRA already.
        """
        targets = target_layer_names
        if targets is None and not isinstance(rank, dict):
            targets = self.default_lora_layer_names()
        self.enable_lora_on({path: (value, lora_alpha) for path, value in lora.select(self, rank, targets).items()})

    def enable_lora_on(self, layers):
        """As `enable_lora`, on layers by path: `{path: (rank, lora_alpha)}`."""
        self.trainable_before_lora = lora.enable(self, layers)
        # What keras-hub's `save_lora_weights` goes by: the layers' numbers among those with weights, and one rank.
        with_weights = [layer for layer in flatten_layers(self)[1:] if layer.weights]
        self._lora_enabled_layers = [i for i, layer in enumerate(with_weights) if layer.path in layers]
        self._lora_rank = max(rank for rank, _ in layers.values())

    def merge_lora(self):
        """Adds what LoRA has learned to the weights and removes it; what was trainable before LoRA is so again.

        Outputs stay the same but for rounding in the weights' dtype.

        Raises:
            ValueError: if the model has no LoRA, or has it on quantized weights, which cannot hold the sum.
        """
        lora.merge(self)
        lora.set_trainable(self, self.trainable_before_lora)
        self._lora_enabled_layers, self.trainable_before_lora = [], []

    def save_lora_weights(self, filepath):
        """Writes LoRA in keras-hub's own format, a `.lora.h5` file.

        Raises:
            ValueError: if the model has no LoRA, or LoRA that the format does not hold: of several ranks, or with a
                `lora_alpha`. `save_lora` writes both.
        """
        if any({layer.lora_rank, layer.lora_alpha} != {self._lora_rank} for layer in lora.lora_layers(self).values()):
            raise ValueError(
                "keras-hub's `.lora.h5` holds one rank and no `lora_alpha`, and this model's LoRA has others. Call "
                "`keras_t5gemma.save_lora(model, folder)`, whose format holds them."
            )
        super().save_lora_weights(filepath)

    def load_lora_weights(self, filepath):
        """Reads LoRA from keras-hub's own format, and enables it on the file's layers if the model has none.

        Raises:
            ValueError: if the model has LoRA on other layers than the file, or of another rank.
        """
        with h5py.File(filepath, "r") as file:
            found = sorted(int(name) for name in file["lora"] if name.isdigit())
            rank = int(file["lora/vars/rank"][()])
        with_weights = [layer for layer in flatten_layers(self)[1:] if layer.weights]
        if not lora.lora_layers(self):
            self.enable_lora_on({with_weights[i].path: (rank, None) for i in found})
        elif found != self._lora_enabled_layers:
            i = min(set(found) ^ set(self._lora_enabled_layers))
            has, lacks = ("file", "model") if i in found else ("model", "file")
            raise ValueError(f"{filepath}: the {has} has LoRA on {with_weights[i].path}, the {lacks} does not.")
        super().load_lora_weights(filepath)

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Quantizes the matrices and the tables of embeddings, as `keras.Model.quantize` does.

        Args:
            mode: "int8", "int4", or "int4/32" and the like for blocks of 32 numbers; may be left out with a config.
            config: a `keras.quantizers.QuantizationConfig`.
            filters: which of them: a regular expression that is searched for in a layer's name, a list of such, or a
                function of a layer.
            **kwargs: what `keras.Model.quantize` takes besides.

        Raises:
            ValueError: for another mode, or if `filters` matches none of them.
        """
        quantize(self, super().quantize, mode, config, filters, **kwargs)

    def get_config(self):
        """The constructor's arguments, JSON-ready, and what `models.saved_state` adds of a model that was changed."""
        return {"name": self.name, "trainable": self.trainable, **self.config.to_dict(), **state_config(self)}

    @classmethod
    def from_config(cls, config):
        """The inverse of `get_config`."""
        return backbone_from_config(config, super().from_config)

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
                in Keras or Hugging Face format. keras-hub's own T5Gemma presets are read too. A model that was saved
                quantized, with LoRA or frozen in part comes back so.
            load_weights: False for the architecture with random weights.
            **kwargs: `dtype`, Keras's policy (`keras.config.dtype_policy()`) if left out, whatever the weights are
                stored in; or what the class takes. "int8_from_bfloat16" and the like, Keras's names for a quantized
                policy, load in bfloat16 and quantize then, as `quantize("int8")` does; "int4/32_from_bfloat16" as
                `quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=32))` does.

        Raises:
            ValueError: where the preset is unknown, or is no T5Gemma.
            ConnectionError: where a download failed.
            CheckpointError: where the folder's tensors are not those of its config.
        """
        folder = locate_t5gemma(preset)
        saved = _saved_config(folder)
        if "quantization" in saved or "lora" in saved:
            # In Keras's own format alone. It builds the whole model first: with zeros, nothing is drawn.
            with weights_from(_zeros) if load_weights else contextlib.nullcontext():
                return super().from_preset(str(folder), load_weights=load_weights, **kwargs)
        kwargs = {name: saved[name] for name in ("name", "trainable") if name in saved} | kwargs
        kwargs["dtype"], mode, config = unquantized(kwargs.get("dtype"))
        source = t5gemma_source(folder)

        def make():
            return cls(**{**source.config.to_dict(), **kwargs})

        backbone = load(make, source.config, source.tensors) if load_weights else make()
        if "trainable_weights" in saved and kwargs.get("trainable", True):
            lora.set_trainable(backbone, saved["trainable_weights"])
        if mode is not None:
            backbone.quantize(mode, config=config)
        return backbone


def _zeros(path, shape, dtype):
    del path
    return keras.ops.zeros(shape, dtype)


def _saved_config(folder):
    """The arguments that `save_to_preset` wrote; none for what another program wrote."""
    if not (folder / "config.json").is_file() or presets.is_hugging_face(folder):
        return {}
    saved = read_json(folder / "config.json")
    return saved["config"] if saved["registered_name"].startswith("keras_t5gemma>") else {}
