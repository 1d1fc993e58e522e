"""The encoder without a decoder, for embeddings and classifiers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import keras

from keras_t5gemma import presets
from keras_t5gemma.checkpoints.sources import encoder_source, open_t5gemma
from keras_t5gemma.config import StackConfig, T5GemmaEncoderConfig
from keras_t5gemma.hub import PresetFolder
from keras_t5gemma.layers import lora
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.stack_model import StackModel, has_saved_layers
from keras_t5gemma.models.stacks import Encoder
from keras_t5gemma.suggestions import check_keywords

INPUT_NAMES = ("token_ids", "padding_mask")


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaEncoder(StackModel):
    """The encoder of a T5Gemma without its decoder: half of the weights, for embeddings and classifiers.

    The input is a dict of int32 tensors [B, S]: `token_ids` and `padding_mask`, which is 0 at padding and 1 elsewhere.
    In rows packed from several texts it numbers them 1, 2, 3, ..., which keeps them apart. The output is [B, S, E].

    `from_preset` takes every T5Gemma: a built-in name, a hub's handle, a folder in Hugging Face's or Keras's format, a
    Flax checkpoint, or a folder of an encoder or a classifier. It reads only the encoder's tensors.

    Args:
        encoder: a size ("s", "b", "l", "ml", "xl", "2b", "9b"), a `StackConfig` or a dict of its fields.
        vocabulary_size: V, rows of the embedding table.
        encoder_attention: "bidirectional"; or "causal", an ablation in arXiv 2504.06225.
        dtype: dtype policy, e.g. "bfloat16" or "mixed_bfloat16".
        **kwargs: `name`, `trainable`.

    Raises:
        ValueError: if a size is unknown or a value is out of range; the message names the argument.

    Example:
        >>> import keras_t5gemma as kt
        >>> encoder = kt.T5GemmaEncoder.from_preset("t5gemma_2b_2b_ul2", dtype="bfloat16")
        >>> kt.export_to_hugging_face(encoder, "encoder")  # for transformers.T5GemmaEncoderModel
    """

    _open = staticmethod(encoder_source)

    def __init__(
        self,
        encoder: str | StackConfig | Mapping,
        *,
        vocabulary_size: int = 256_000,
        encoder_attention: str = "bidirectional",
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs,
    ):
        check_keywords(T5GemmaEncoder, kwargs, ("name", "trainable"))
        config = T5GemmaEncoderConfig(presets.stack(encoder), vocabulary_size, encoder_attention)
        causal = encoder_attention == "causal"
        stack = Encoder(config.encoder, vocabulary_size, causal=causal, dtype=dtype, name="encoder")
        self._build_around(stack, config, dtype=dtype, **kwargs)
        if not self.trainable:
            lora.set_trainable(self, [])  # Keras froze the model before it had weights

    def _build_around(self, stack: Encoder, config: T5GemmaEncoderConfig, **kwargs) -> None:
        """Makes the model from its stack, a new one or a backbone's."""
        inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in INPUT_NAMES}
        super().__init__(inputs=inputs, outputs=stack(*inputs.values()), **kwargs)
        self.config = config
        self.encoder = stack
        self.token_embedding = stack.token_embedding
        self.trainable_before_lora = []

    @classmethod
    def from_backbone(cls, backbone: T5GemmaBackbone, **kwargs) -> Self:
        """The encoder of a backbone. Both models share the variables, so nothing is copied.

        What trains, quantizes or adapts the one does so to the other's encoder. Enable LoRA and quantize before.

        Args:
            backbone: a `T5GemmaBackbone`, which may be quantized or have LoRA.
            **kwargs: `name`.

        Raises:
            ValueError: if `backbone` is not a `T5GemmaBackbone`.
        """
        if not isinstance(backbone, T5GemmaBackbone):
            raise ValueError(f"`backbone` must be a T5GemmaBackbone. Received: {type(backbone).__name__}.")
        encoder = cls.__new__(cls)
        encoder._build_around(backbone.encoder, backbone.config.encoder_alone(), dtype=backbone.dtype_policy, **kwargs)
        if layers := lora.lora_layers(encoder):
            own = {variable.path for variable in encoder.weights}
            before = [path for path in backbone.trainable_before_lora if path in own]
            encoder.lora_enabled_on({path: layer.lora_rank for path, layer in layers.items()}, before)
        return encoder

    @property
    def rematerialize(self) -> bool:
        """Whether training recomputes activations in the backward pass, see `T5GemmaBackbone.rematerialize`."""
        return self.encoder.rematerialize

    @rematerialize.setter
    def rematerialize(self, value: bool):
        self.encoder.rematerialize = bool(value)

    @classmethod
    def from_preset(cls, preset: str | Path | PresetFolder, load_weights: bool = True, **kwargs) -> Self:
        """Loads the encoder of a preset, and of its weights reads only these.

        The preset of a `T5GemmaBackbone` that was saved quantized or with LoRA is read as a whole first.

        Args:
            preset: a name or folder as for `T5GemmaBackbone.from_preset`, or a folder of an encoder or a classifier.
            load_weights: False for the architecture with random weights.
            **kwargs: arguments of the class, such as `dtype`, as for `T5GemmaBackbone.from_preset`.

        Raises:
            ValueError: if the preset is unknown, or is not a T5Gemma.
            ConnectionError: if a download failed.
            CheckpointError: if the folder's tensors are not those of its config.
        """
        folder = open_t5gemma(preset)
        if has_saved_layers(folder, T5GemmaBackbone):
            return cls.from_backbone(T5GemmaBackbone.from_preset(folder, load_weights=load_weights, **kwargs))
        return super().from_preset(folder, load_weights=load_weights, **kwargs)
