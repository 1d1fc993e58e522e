"""The backbone: both stacks as one Keras model from token ids to hidden states."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import h5py
import keras
import keras_hub

from keras_t5gemma import presets
from keras_t5gemma._keras_internals import flatten_layers
from keras_t5gemma.checkpoints.load import load
from keras_t5gemma.checkpoints.sources import open_t5gemma, t5gemma_source
from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.hub import PresetFolder
from keras_t5gemma.layers import lora
from keras_t5gemma.layers.initialization import weights_from
from keras_t5gemma.models.guarded import Guarded
from keras_t5gemma.models.quantization import QuantizationMixin, quantize, unquantized
from keras_t5gemma.models.saved_state import backbone_from_config, state_config
from keras_t5gemma.models.sharding import layout_map
from keras_t5gemma.models.stacks import Decoder, Encoder

INPUT_NAMES = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaBackbone(Guarded, QuantizationMixin, keras_hub.models.Backbone):
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

    presets = presets.PRESETS

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
        if unknown := sorted(set(kwargs) - {"name", "trainable"}):  # Keras would silently accept them
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

    def default_lora_layer_names(self) -> list[str]:
        """The default targets of `enable_lora`: the query and value projections of each attention."""
        return ["query", "value"]

    def enable_lora(
        self,
        rank: int | Mapping[str, int],
        target_layer_names: str | Sequence[str] | None = None,
        *,
        lora_alpha: float | None = None,
    ) -> None:
        """Adds LoRA (arXiv 2106.09685) to some layers and freezes all other weights.

            backbone.enable_lora(8)  # queries and values of each attention
            backbone.enable_lora(8, "decoder/*/cross_attention/*")
            backbone.enable_lora(8, ["query", "key", "value", "output", "gate", "up", "down"])
            backbone.enable_lora({"decoder/layer_2[0-5]/*": 16, "encoder/*": 4})

        Args:
            rank: the rank of LoRA's matrices; or a dict of targets and their ranks, in which the first target that
                matches a layer gives its rank.
            target_layer_names: one target or several: layer names ("query"), paths
                ("decoder/layer_0/self_attention/query"), or patterns of paths, in which `*` matches any text. Patterns
                match no embedding table; name it by its own name or path.
            lora_alpha: LoRA's product is multiplied by `lora_alpha / rank`; None for a factor of 1.

        Raises:
            ValueError: if a target matches no layer, a rank is not a positive integer, or the model already has LoRA.
        """
        targets = target_layer_names
        if targets is None and not isinstance(rank, dict):
            targets = self.default_lora_layer_names()
        self.enable_lora_on({path: (value, lora_alpha) for path, value in lora.select(self, rank, targets).items()})

    def enable_lora_on(self, layers: Mapping[str, tuple[int, float | None]]) -> None:
        """Adds LoRA to layers selected by path and freezes all other weights.

        Args:
            layers: `{path: (rank, lora_alpha)}`.

        Raises:
            ValueError: if the model already has LoRA.
        """
        self.trainable_before_lora = lora.enable(self, layers)
        # keras-hub's `save_lora_weights` reads these: the layers' indices among those with weights, and one rank.
        with_weights = [layer for layer in flatten_layers(self)[1:] if layer.weights]
        self._lora_enabled_layers = [i for i, layer in enumerate(with_weights) if layer.path in layers]
        self._lora_rank = max(rank for rank, _ in layers.values())

    def merge_lora(self) -> None:
        """Adds LoRA's products to the weights and removes LoRA. The weights that were trainable before are so again.

        Outputs change only by rounding in the weights' dtype.

        Raises:
            ValueError: if the model has no LoRA, or has it on quantized weights, which cannot store the sum.
        """
        lora.merge(self)
        lora.set_trainable(self, self.trainable_before_lora)
        self._lora_enabled_layers, self.trainable_before_lora = [], []

    def save_lora_weights(self, filepath: str | Path) -> None:
        """Writes LoRA in keras-hub's own format, a `.lora.h5` file.

        Raises:
            ValueError: if the model has no LoRA, or if its LoRA has several ranks or a `lora_alpha`, which the format
                cannot store. `save_lora` writes both.
        """
        if any({layer.lora_rank, layer.lora_alpha} != {self._lora_rank} for layer in lora.lora_layers(self).values()):
            raise ValueError(
                "keras-hub's `.lora.h5` holds one rank and no `lora_alpha`, and this model's LoRA has others. Call "
                "`keras_t5gemma.save_lora(model, folder)`, whose format holds them."
            )
        super().save_lora_weights(filepath)

    def load_lora_weights(self, filepath: str | Path) -> None:
        """Reads LoRA from keras-hub's own format. If the model has no LoRA, enables it on the file's layers.

        Raises:
            ValueError: if the model and the file have LoRA on different layers or of different rank.
        """
        with h5py.File(filepath, "r") as file:
            in_file = sorted(int(name) for name in file["lora"] if name.isdigit())
            rank = int(file["lora/vars/rank"][()])
        with_weights = [layer for layer in flatten_layers(self)[1:] if layer.weights]
        if not lora.lora_layers(self):
            self.enable_lora_on({with_weights[i].path: (rank, None) for i in in_file})
        elif in_file != self._lora_enabled_layers:
            i = min(set(in_file) ^ set(self._lora_enabled_layers))
            has, lacks = ("file", "model") if i in in_file else ("model", "file")
            raise ValueError(f"{filepath}: the {has} has LoRA on {with_weights[i].path}, the {lacks} does not.")
        super().load_lora_weights(filepath)

    def quantize(
        self,
        mode: str | None = None,
        config: keras.quantizers.QuantizationConfig | None = None,
        filters: str | Sequence[str] | Callable | None = None,
        **kwargs,
    ) -> None:
        """Quantizes the dense layers and the embedding tables, as `keras.Model.quantize` does.

        Args:
            mode: "int8", "int4", or e.g. "int4/32" for int4 in blocks of 32 numbers; may be left out with a config.
            config: a `keras.quantizers.QuantizationConfig`.
            filters: selects the layers: a regular expression that is searched for in the layer's name, a list of
                these, or a function of a layer.
            **kwargs: further arguments of `keras.Model.quantize`.

        Raises:
            ValueError: if the mode is unknown, or if `filters` matches no layer that can be quantized.
        """
        quantize(self, super().quantize, mode, config, filters, **kwargs)

    def get_config(self) -> dict:
        """The constructor's arguments and the entries of `models.saved_state`, JSON-ready."""
        return {"name": self.name, "trainable": self.trainable, **self.config.to_dict(), **state_config(self)}

    @classmethod
    def from_config(cls, config: Mapping) -> "T5GemmaBackbone":
        """Creates a backbone from the result of `get_config`, with new weights."""
        return backbone_from_config(config, super().from_config)

    @staticmethod
    def get_layout_map(
        device_mesh: keras.distribution.DeviceMesh,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
        config: T5GemmaConfig | None = None,
    ) -> keras.distribution.LayoutMap:
        """The layouts of weights and activations on several devices, through keras-hub's interface.

        Args:
            device_mesh: a `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: the axis of the mesh along which each layer is divided.
            data_parallel_dim_name: the axis along which the batch and the weights are divided.
            config: the model's `T5GemmaConfig`, needed if sizes do not divide by the mesh. See `layout_map`.

        Returns:
            A `keras.distribution.LayoutMap`.

        Raises:
            ValueError: if `device_mesh` is not a `DeviceMesh`, or has no axis for the batch.
        """
        return layout_map(device_mesh, config, data_axis=data_parallel_dim_name, model_axis=model_parallel_dim_name)

    @classmethod
    def from_preset(cls, preset: str | Path | PresetFolder, load_weights: bool = True, **kwargs) -> "T5GemmaBackbone":
        """Loads the backbone of a preset.

        Args:
            preset: a built-in name (`keras-t5gemma presets` lists them), "hf://owner/name", "kaggle://...", or a folder
                in Keras or Hugging Face format. keras-hub's own T5Gemma presets are read too. A model that was saved
                quantized, with LoRA or partly frozen is restored as such.
            load_weights: False for the architecture with random weights.
            **kwargs: arguments of the class, such as `dtype`. If `dtype` is left out, it is Keras's policy
                (`keras.config.dtype_policy()`), whatever the dtype of the stored weights. Keras's names of quantized
                policies load first and quantize afterwards. "int8_from_bfloat16" loads in bfloat16 and calls
                `quantize("int8")`. "int4/32_from_bfloat16" calls
                `quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=32))`.

        Raises:
            ValueError: if the preset is unknown, or is not a T5Gemma.
            ConnectionError: if a download failed.
            CheckpointError: if the folder's tensors are not those of its config.
        """
        folder = open_t5gemma(preset)
        saved = _saved_config(folder)
        if "quantization" in saved or "lora" in saved:
            # Only Keras's own format has these. Keras builds the whole model first: zeros need no random draws.
            with weights_from(_zeros) if load_weights else contextlib.nullcontext():
                return super().from_preset(str(folder), load_weights=load_weights, **kwargs)
        kwargs = {name: saved[name] for name in ("name", "trainable") if name in saved} | kwargs
        kwargs["dtype"], mode, config = unquantized(kwargs.get("dtype"))
        source = t5gemma_source(folder)

        def build():
            return cls(**{**source.config.to_dict(), **kwargs})

        backbone = load(build, source.config, source.tensors) if load_weights else build()
        if "trainable_weights" in saved and kwargs.get("trainable", True):
            lora.set_trainable(backbone, saved["trainable_weights"])
        if mode is not None:
            backbone.quantize(mode, config=config)
        return backbone


def _zeros(path, shape, dtype):
    del path
    return keras.ops.zeros(shape, dtype)


def _saved_config(folder: PresetFolder) -> dict:
    """The arguments that `save_to_preset` wrote; empty if another program wrote the folder."""
    saved = folder.config or {}
    return saved["config"] if str(saved.get("registered_name")).startswith("keras_t5gemma>") else {}
