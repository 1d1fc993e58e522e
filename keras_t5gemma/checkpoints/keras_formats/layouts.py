"""How Keras models lay out their tensors: keras-hub's Gemma 2 and T5Gemma, and ours. Needs no Keras.

A tensor's group is the path of its layer by attributes, as Keras's h5 files write it: "self_attention/query_dense" in
the block. The same table serves a file and a model in memory.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config, layer_pattern
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.checkpoints.tensor_table import TABLE, tensor_specs
from keras_t5gemma.config import StackConfig, T5GemmaConfig

# Our layer within a block: in keras-hub's Gemma, in keras-hub's T5Gemma; each with the kernel's axes, a letter each as
# in the table of `tensor_table`. keras-hub's einsum layers keep the heads as an axis. No axes: a norm's scale.
_IN_BLOCK = {
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
# Ours: attributes are the layers' names, with `_dense` after those of kernels.
_OWN = {
    row.path.partition("{i}/")[2].rpartition("/")[0]: row.path.partition("{i}/")[2].rpartition("/")[0]
    + (f"_dense: {row.letters}" if row.path.endswith("kernel") else "")
    for row in TABLE
    if row.per_layer
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One class of Keras models.

    Attributes:
        registered_names: of its `config.json`, across releases.
        read_config: its constructor's arguments, and where they come from, to a config of ours.
        groups: (group in the h5 file, attribute of the model) of what is no block, by stack and our layer.
        blocks: likewise of the list of blocks, by stack.
        in_block: our layer within a block to theirs with its axes.
    """

    registered_names: tuple[str, ...]
    read_config: Callable[[Mapping, str], T5GemmaConfig | Gemma2Config]
    groups: Mapping[tuple[str, str], tuple[str, str]]
    blocks: Mapping[str, tuple[str, str]]
    in_block: Mapping[str, str]

    def place(self, tensor):
        """Where a tensor lies.

        Args:
            tensor: a `tensor_table.TensorSpec`.

        Returns:
            A `Place`.
        """
        layer, _, weight = tensor.row.path.rpartition("/")
        index = 1 if weight == "reverse_embeddings" else 0
        if tensor.layer is None:
            group, attribute = self.groups[tensor.stack, layer.rpartition("/")[2]]
            return Place(group, attribute, index, tensor.row.letters)
        group, attribute = self.blocks[tensor.stack]
        theirs, _, letters = self.in_block[layer.partition("{i}/")[2]].partition(": ")
        suffix = f"_{tensor.layer}" if tensor.layer else ""  # Keras counts a class's layers: block, block_1, ...
        return Place(f"{group}{suffix}/{theirs}", f"{attribute}/{tensor.layer}/{theirs}", index, letters or "D")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a Keras model keeps a tensor.

    Attributes:
        group: the layer's path in an h5 file, below `layers`.
        attribute: the layer's path in a model, attributes and indices.
        index: of the tensor among the layer's weights.
        letters: its axes.
    """

    group: str
    attribute: str
    index: int
    letters: str


def stored_shape(shape, letters, stored):
    """The shape in Hugging Face's layout of an array that lies as `letters`.

    Args:
        shape: of the array.
        letters: its axes, "K D H".
        stored: Hugging Face's, "KH D".
    """
    sizes = dict(zip(letters.split(), shape, strict=True))
    # Our own kernels have merged axes already ("D KH"), keras-hub's have an axis a letter.
    return tuple(
        sizes[axis] if axis in sizes else math.prod(sizes[letter] for letter in axis) for axis in stored.split()
    )


def to_stored(array, letters, stored):
    """An array that lies as `letters`, in Hugging Face's layout; a view where that is possible."""
    axes, wanted = letters.split(), stored.split()
    order = wanted if set(wanted) == set(axes) else list(stored.replace(" ", ""))
    return array.transpose([axes.index(axis) for axis in order]).reshape(stored_shape(array.shape, letters, stored))


def expected_tensors(config):
    """The tensors of a config by name in Hugging Face's checkpoints: `{name: tensor_table.TensorSpec}`."""
    if isinstance(config, Gemma2Config):
        return {tensor.gemma2: tensor for tensor in config.tensors()}
    return {tensor.name: tensor for tensor in tensor_specs(config)}


def _gemma2_config(values, where):
    """A `Gemma2Config` of the config of keras-hub's Gemma backbone."""
    for name in ("use_post_ffw_norm", "use_post_attention_norm"):
        if not values.get(name):
            raise CheckpointError(
                f"{where}: `{name}` is {values.get(name)}, as in Gemma 1. Expected True, as in Gemma 2."
            )
    if values.get("layer_norm_epsilon", 1e-6) != 1e-6:
        # keras-hub 0.32 gives it to the last norm only; the blocks have 1e-6 whatever it says.
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
        # What the weights were trained with (Gemma 2 27B has False); keras-hub 0.32 itself scales by the head size
        # in either case.
        query_scalar=None
        if values.get("query_head_dim_normalize", True)
        else values["hidden_dim"] // values["num_query_heads"],
        attention_soft_cap=values.get("attention_logit_soft_cap"),
        dropout=values.get("dropout", 0),
    )
    return Gemma2Config(stack, values["vocabulary_size"], values.get("final_logit_soft_cap"))


def _keras_hub_t5gemma_config(values, where):
    """A `T5GemmaConfig` of the config of keras-hub's T5Gemma backbone."""
    for name, default, expected in (
        ("attention_bias", False, False),
        ("hidden_activation", "gelu_approximate", "gelu_approximate"),
        ("cross_attention_hidden_size", None, values["encoder_hidden_dim"]),
    ):
        found = values.get(name, default)
        if found is not None and found != expected:
            raise CheckpointError(f"{where}: `{name}` is {found!r}. Expected {expected!r}.")
    return T5GemmaConfig(
        encoder=_keras_hub_stack(values, "encoder"),
        decoder=_keras_hub_stack(values, "decoder"),
        vocabulary_size=values["vocabulary_size"],
        final_logit_soft_cap=values.get("final_logit_softcapping"),
        tie_embeddings=values.get("tie_word_embeddings", True),
    )


def _keras_hub_stack(values, stack):
    """One stack's `StackConfig` of keras-hub's T5Gemma config."""

    def own(name):
        return values[f"{stack}_{name}"]

    scalar = values.get("query_pre_attn_scalar", 1.0)
    return StackConfig(
        num_layers=own("num_layers"),
        hidden_dim=own("hidden_dim"),
        intermediate_dim=own("intermediate_dim"),
        num_query_heads=own("num_attention_heads"),
        num_key_value_heads=own("num_key_value_heads"),
        head_dim=own("head_dim"),
        layer_pattern=layer_pattern(own("layer_types")),
        query_scalar=None if scalar == own("head_dim") else scalar,
        attention_soft_cap=values.get("attn_logit_softcapping"),
        rope_wavelength=values.get("rope_max_wavelength", 10_000.0),
        norm_epsilon=values.get("rms_norm_eps", 1e-6),
        dropout=values.get("dropout_rate", 0.0),
        initializer_range=values.get("initializer_range", 0.02),
        **({} if values.get("sliding_window") is None else {"sliding_window": values["sliding_window"]}),
    )


def _own_config(values, where):
    del where
    known = {field.name for field in dataclasses.fields(T5GemmaConfig)}
    return T5GemmaConfig.from_dict({name: value for name, value in values.items() if name in known})


GEMMA2 = Layout(
    ("keras_hub>GemmaBackbone", "keras_nlp>GemmaBackbone"),
    _gemma2_config,
    {
        ("encoder", "token_embedding"): ("reversible_embedding", "token_embedding"),
        ("encoder", "final_norm"): ("rms_normalization", "layer_norm"),
    },
    {"encoder": ("gemma_decoder_block", "transformer_layers")},
    {ours: gemma for ours, (gemma, _) in _IN_BLOCK.items()},
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
