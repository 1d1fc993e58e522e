"""The layouts of tensors in Keras models: keras-hub's Gemma 2 and T5Gemma, and ours. Needs no Keras.

A tensor's group is its layer's path of attributes, as Keras's h5 files have it: "self_attention/query_dense" within a
block. One table describes both the files and the models in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config, layer_pattern
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.checkpoints.tensor_table import TABLE, TensorSpec, tensor_specs
from keras_t5gemma.config import StackConfig, T5GemmaConfig, T5GemmaEncoderConfig

AnyConfig = TypeVar("AnyConfig", bound=T5GemmaConfig | T5GemmaEncoderConfig | Gemma2Config)

# The path of our layer within a block, then its path in keras-hub's Gemma and in keras-hub's T5Gemma. After the colon
# are the kernel's axes, one letter per axis as in `tensor_table`: keras-hub's einsum layers keep the heads as an axis.
# A path without axes is that of a norm, whose weight is its scale.
_IN_BLOCK: dict[str, tuple[str | None, str]] = {
    "pre_self_attention_norm": ("pre_attention_norm", "pre_self_attn_layernorm"),
    "self_attention/query": ("attention/query_dense: N D H", "self_attn/query_dense: D N H"),
    "self_attention/key": ("attention/key_dense: K D H", "self_attn/key_dense: D K H"),
    "self_attention/value": ("attention/value_dense: K D H", "self_attn/value_dense: D K H"),
    "self_attention/output": ("attention/output_dense: N H D", "self_attn/output_dense: N H D"),
    "post_self_attention_norm": ("post_attention_norm", "post_self_attn_layernorm"),
    "pre_cross_attention_norm": (None, "pre_cross_attn_layernorm"),
    "cross_attention/query": (None, "cross_attn/query_dense: D N H"),
    "cross_attention/key": (None, "cross_attn/key_dense: E K H"),
    "cross_attention/value": (None, "cross_attn/value_dense: E K H"),
    "cross_attention/output": (None, "cross_attn/output_dense: N H D"),
    "post_cross_attention_norm": (None, "post_cross_attn_layernorm"),
    "pre_feed_forward_norm": ("pre_ffw_norm", "pre_feedforward_layernorm"),
    "feed_forward/gate": ("gating_ffw: D F", "mlp/gate_proj: D F"),
    "feed_forward/up": ("gating_ffw_2: D F", "mlp/up_proj: D F"),
    "feed_forward/down": ("ffw_linear: F D", "mlp/down_proj: F D"),
    "post_feed_forward_norm": ("post_ffw_norm", "post_feedforward_layernorm"),
}
# In our own models a layer's attribute has the layer's name, with `_dense` appended if the layer has a kernel.
_OWN = {
    row.path.partition("{i}/")[2].rpartition("/")[0]: row.path.partition("{i}/")[2].rpartition("/")[0]
    + (f"_dense: {row.letters}" if row.path.endswith("kernel") else "")
    for row in TABLE
    if row.per_layer
}


@dataclasses.dataclass(frozen=True)
class Layout(Generic[AnyConfig]):
    """The layout of tensors in one class of Keras models.

    Attributes:
        registered_names: the class's names in `config.json`, across releases.
        read_config: a function from the constructor's arguments, and their origin for messages, to a config of ours.
        groups: (group in the h5 file, attribute of the model) of a layer outside the blocks, by stack and our layer.
        blocks: (group in the h5 file, attribute of the model) of the list of blocks, by stack.
        in_block: the layer's path with its axes, by the path of our layer within a block.
    """

    registered_names: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], str], AnyConfig]
    groups: Mapping[tuple[str, str], tuple[str, str]]
    blocks: Mapping[str, tuple[str, str]]
    in_block: Mapping[str, str]

    def place(self, tensor: TensorSpec) -> Place:
        """The `Place` of a tensor in this layout."""
        layer, _, weight = tensor.row.path.rpartition("/")
        index = 1 if weight == "reverse_embeddings" else 0
        if tensor.layer is None:
            group, attribute = self.groups[tensor.stack, layer.rpartition("/")[2]]
            return Place(group, attribute, index, tensor.row.letters)
        group, attribute = self.blocks[tensor.stack]
        theirs, _, letters = self.in_block[layer.partition("{i}/")[2]].partition(": ")
        suffix = f"_{tensor.layer}" if tensor.layer else ""  # Keras numbers layers of one class: block, block_1, ...
        return Place(f"{group}{suffix}/{theirs}", f"{attribute}/{tensor.layer}/{theirs}", index, letters or "D")


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a tensor in a Keras model.

    Attributes:
        group: the layer's path in an h5 file, below `layers`.
        attribute: the layer's path in a model: attributes and indices.
        index: the tensor's index among the layer's weights.
        letters: the tensor's axes.
    """

    group: str
    attribute: str
    index: int
    letters: str


def stored_shape(shape: Sequence[int], letters: str, stored: str) -> tuple[int, ...]:
    """The shape that an array has in Hugging Face's layout.

    Args:
        shape: the array's own shape.
        letters: the array's axes, e.g. "K D H".
        stored: Hugging Face's axes, e.g. "KH D".

    Returns:
        A size per axis of `stored`.
    """
    sizes = dict(zip(letters.split(), shape, strict=True))
    # Our own kernels have merged axes already ("D KH"); keras-hub's have one axis per letter.
    return tuple(
        sizes[axis] if axis in sizes else math.prod(sizes[letter] for letter in axis) for axis in stored.split()
    )


def to_stored(array: np.ndarray, letters: str, stored: str) -> np.ndarray:
    """Converts an array to Hugging Face's layout; returns a view if that is possible.

    Args:
        array: an array with the axes `letters`.
        letters: the array's axes, e.g. "K D H".
        stored: Hugging Face's axes, e.g. "KH D".

    Returns:
        An array with the axes `stored`.
    """
    axes, stored_axes = letters.split(), stored.split()
    order = stored_axes if set(stored_axes) == set(axes) else list(stored.replace(" ", ""))
    return array.transpose([axes.index(axis) for axis in order]).reshape(stored_shape(array.shape, letters, stored))


def expected_tensors(config: T5GemmaConfig | T5GemmaEncoderConfig | Gemma2Config) -> dict[str, TensorSpec]:
    """The tensors of a config, by their names in Hugging Face's checkpoints."""
    if isinstance(config, Gemma2Config):
        return {tensor.gemma2: tensor for tensor in config.tensors() if tensor.gemma2 is not None}
    return {tensor.name: tensor for tensor in tensor_specs(config)}


def _gemma2_config(values: Mapping[str, Any], where: str) -> Gemma2Config:
    """Converts the config of keras-hub's Gemma backbone to a `Gemma2Config`."""
    for name in ("use_post_ffw_norm", "use_post_attention_norm"):
        if not values.get(name):
            raise CheckpointError(
                f"{where}: `{name}` is {values.get(name)}, as in Gemma 1. Expected True, as in Gemma 2."
            )
    if values.get("layer_norm_epsilon", 1e-6) != 1e-6:
        # keras-hub 0.32 applies it to the last norm only; the blocks always use 1e-6.
        raise CheckpointError(f"{where}: `layer_norm_epsilon` is {values['layer_norm_epsilon']}. Expected 1e-6.")
    if values["intermediate_dim"] % 2:
        raise CheckpointError(f"{where}: `intermediate_dim` is {values['intermediate_dim']}. Expected an even number.")
    sliding = values.get("use_sliding_window_attention", False)
    stack = StackConfig(
        num_layers=values["num_layers"],
        hidden_dim=values["hidden_dim"],
        intermediate_dim=values["intermediate_dim"] // 2,  # keras-hub counts both halves of the gated feed-forward.
        num_query_heads=values["num_query_heads"],
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        sliding_window=values.get("sliding_window_size", 4096),
        layer_pattern=("sliding", "global") if sliding else ("global",),
        # The scale that the weights were trained with (Gemma 2 27B has False). keras-hub 0.32 itself always scales by
        # the head size.
        query_scalar=None
        if values.get("query_head_dim_normalize", True)
        else values["hidden_dim"] // values["num_query_heads"],
        attention_soft_cap=values.get("attention_logit_soft_cap"),
        dropout=values.get("dropout", 0),
    )
    return Gemma2Config(stack, values["vocabulary_size"], values.get("final_logit_soft_cap"))


def _keras_hub_t5gemma_config(values: Mapping[str, Any], where: str) -> T5GemmaConfig:
    """Converts the config of keras-hub's T5Gemma backbone to a `T5GemmaConfig`."""
    for name, default, expected in (
        ("attention_bias", False, False),
        ("hidden_activation", "gelu_approximate", "gelu_approximate"),
        ("cross_attention_hidden_size", None, values["encoder_hidden_dim"]),
    ):
        value = values.get(name, default)
        if value is not None and value != expected:
            raise CheckpointError(f"{where}: `{name}` is {value!r}. Expected {expected!r}.")
    return T5GemmaConfig(
        encoder=_keras_hub_stack(values, "encoder"),
        decoder=_keras_hub_stack(values, "decoder"),
        vocabulary_size=values["vocabulary_size"],
        final_logit_soft_cap=values.get("final_logit_softcapping"),
        tie_embeddings=values.get("tie_word_embeddings", True),
    )


def _keras_hub_stack(values: Mapping[str, Any], stack: str) -> StackConfig:
    """The `StackConfig` of one stack in keras-hub's T5Gemma config."""

    def field(name: str) -> Any:
        return values[f"{stack}_{name}"]

    scalar = values.get("query_pre_attn_scalar", 1.0)
    return StackConfig(
        num_layers=field("num_layers"),
        hidden_dim=field("hidden_dim"),
        intermediate_dim=field("intermediate_dim"),
        num_query_heads=field("num_attention_heads"),
        num_key_value_heads=field("num_key_value_heads"),
        head_dim=field("head_dim"),
        layer_pattern=layer_pattern(field("layer_types")),
        query_scalar=None if scalar == field("head_dim") else scalar,
        attention_soft_cap=values.get("attn_logit_softcapping"),
        rope_wavelength=values.get("rope_max_wavelength", 10_000.0),
        norm_epsilon=values.get("rms_norm_eps", 1e-6),
        dropout=values.get("dropout_rate", 0.0),
        initializer_range=values.get("initializer_range", 0.02),
        **({} if values.get("sliding_window") is None else {"sliding_window": values["sliding_window"]}),
    )


def _own_config(values: Mapping[str, Any], where: str) -> T5GemmaConfig:
    """Takes the fields of a `T5GemmaConfig` from the config of our own backbone."""
    del where
    return _own_fields(T5GemmaConfig, values)


def _own_encoder_config(values: Mapping[str, Any], where: str) -> T5GemmaEncoderConfig:
    """Takes the fields of a `T5GemmaEncoderConfig` from the config of our own encoder."""
    del where
    return _own_fields(T5GemmaEncoderConfig, values)


def _own_fields(cls: Any, values: Mapping[str, Any]) -> Any:
    """An instance of a config's class from those values that are its fields."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls.from_dict({name: value for name, value in values.items() if name in names})


GEMMA2 = Layout(
    ("keras_hub>GemmaBackbone", "keras_nlp>GemmaBackbone"),
    _gemma2_config,
    {
        ("encoder", "token_embedding"): ("reversible_embedding", "token_embedding"),
        ("encoder", "final_norm"): ("rms_normalization", "layer_norm"),
    },
    {"encoder": ("gemma_decoder_block", "transformer_layers")},
    {ours: gemma for ours, (gemma, _) in _IN_BLOCK.items() if gemma is not None},
)
KERAS_HUB_T5GEMMA = Layout(
    ("keras_hub>T5GemmaBackbone",),
    _keras_hub_t5gemma_config,
    {
        ("encoder", "token_embedding"): ("embedding", "token_embedding"),
        ("encoder", "final_norm"): ("rms_normalization", "encoder_norm"),
        ("decoder", "token_embedding"): ("reversible_embedding", "decoder_token_embedding"),
        ("decoder", "final_norm"): ("rms_normalization_1", "decoder_norm"),
    },
    {
        "encoder": ("t5_gemma_encoder_layer", "encoder_layers"),
        "decoder": ("t5_gemma_decoder_layer", "decoder_layers"),
    },
    {ours: t5gemma for ours, (_, t5gemma) in _IN_BLOCK.items()},
)
OWN = Layout(
    ("keras_t5gemma>T5GemmaBackbone",),
    _own_config,
    {
        (stack, layer): (f"{stack}/{layer}", f"{stack}/{layer}")
        for stack in ("encoder", "decoder")
        for layer in ("token_embedding", "final_norm")
    },
    {stack: (f"{stack}/blocks/block", f"{stack}/blocks") for stack in ("encoder", "decoder")},
    _OWN,
)
OWN_ENCODER = dataclasses.replace(
    OWN, registered_names=("keras_t5gemma>T5GemmaEncoder",), read_config=_own_encoder_config
)
