"""The one table of T5Gemma's tensors, one row per kind. Loading, export, adaptation and counting all read it.

Letters in shapes: V vocabulary, D width, E the encoder's width, N query heads, K key/value heads, H head size, F
feed-forward. Letters written together are one axis: "D NH" is a matrix of D rows and N x H columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from keras_t5gemma.config import T5GemmaConfig, T5GemmaEncoderConfig

if TYPE_CHECKING:
    import numpy as np

STACKS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor; `{s}` stands for the stack, `{i}` for the layer.

    Attributes:
        path: the path of our Keras variable.
        letters: the shape of our variable.
        t5gemma: the name in a Hugging Face T5Gemma.
        gemma2: the name in a Hugging Face Gemma 2, or `None` if Gemma 2 has no such tensor.
        transposed: whether Hugging Face's tensor is the transpose of ours: its linear layers are [out, in].
        untied_only: whether it exists only if the output projection is not the decoder's embedding.
    """

    path: str
    letters: str
    t5gemma: str
    gemma2: str | None
    transposed: bool = False
    untied_only: bool = False

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks that have the tensor: the decoder alone, if Gemma 2 lacks it."""
        return ("decoder",) if self.gemma2 is None else STACKS

    @property
    def stored_letters(self) -> str:
        """The shape in a Hugging Face file, in letters."""
        return " ".join(reversed(self.letters.split())) if self.transposed else self.letters

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one."""
        return "{i}" in self.path


def _in_layer(path: str, letters: str, t5gemma: str, gemma2: str | None, transposed: bool) -> Row:
    gemma2 = None if gemma2 is None else f"model.layers.{{i}}.{gemma2}.weight"
    return Row(f"{{s}}/layer_{{i}}/{path}", letters, f"model.{{s}}.layers.{{i}}.{t5gemma}.weight", gemma2, transposed)


def _scale(path: str, t5gemma: str, gemma2: str | None) -> Row:
    return _in_layer(f"{path}/scale", "D", t5gemma, gemma2, False)


def _kernel(path: str, letters: str, t5gemma: str, gemma2: str | None) -> Row:
    return _in_layer(f"{path}/kernel", letters, t5gemma, gemma2, True)


# fmt: off
TABLE = (
    Row("{s}/token_embedding/embeddings", "V D", "model.{s}.embed_tokens.weight", "model.embed_tokens.weight"),
    Row("{s}/token_embedding/reverse_embeddings", "D V", "lm_head.out_proj.weight", None, True, untied_only=True),
    #       our layer                    kernel  in T5Gemma                    in Gemma 2
    _scale("pre_self_attention_norm",            "pre_self_attn_layernorm",    "input_layernorm"),
    _kernel("self_attention/query",      "D NH", "self_attn.q_proj",           "self_attn.q_proj"),
    _kernel("self_attention/key",        "D KH", "self_attn.k_proj",           "self_attn.k_proj"),
    _kernel("self_attention/value",      "D KH", "self_attn.v_proj",           "self_attn.v_proj"),
    _kernel("self_attention/output",     "NH D", "self_attn.o_proj",           "self_attn.o_proj"),
    _scale("post_self_attention_norm",           "post_self_attn_layernorm",   "post_attention_layernorm"),
    _scale("pre_cross_attention_norm",           "pre_cross_attn_layernorm",   None),
    _kernel("cross_attention/query",     "D NH", "cross_attn.q_proj",          None),
    _kernel("cross_attention/key",       "E KH", "cross_attn.k_proj",          None),
    _kernel("cross_attention/value",     "E KH", "cross_attn.v_proj",          None),
    _kernel("cross_attention/output",    "NH D", "cross_attn.o_proj",          None),
    _scale("post_cross_attention_norm",          "post_cross_attn_layernorm",  None),
    _scale("pre_feed_forward_norm",              "pre_feedforward_layernorm",  "pre_feedforward_layernorm"),
    _kernel("feed_forward/gate",         "D F",  "mlp.gate_proj",              "mlp.gate_proj"),
    _kernel("feed_forward/up",           "D F",  "mlp.up_proj",                "mlp.up_proj"),
    _kernel("feed_forward/down",         "F D",  "mlp.down_proj",              "mlp.down_proj"),
    _scale("post_feed_forward_norm",             "post_feedforward_layernorm", "post_feedforward_layernorm"),
    Row("{s}/final_norm/scale", "D", "model.{s}.norm.weight", "model.norm.weight"),
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of one model: a row with its letters filled in.

    Attributes:
        row: the table's row.
        stack: "encoder" or "decoder".
        layer: the layer's index, or `None`.
        path: the path of our Keras variable.
        name: the name in a Hugging Face T5Gemma.
        gemma2: the name in the Gemma 2 that this stack could be adapted from, or `None`.
        shape: the shape of our variable.
    """

    row: Row
    stack: str
    layer: int | None
    path: str
    name: str
    gemma2: str | None
    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in a Hugging Face file."""
        return self.shape[::-1] if self.row.transposed else self.shape

    def from_stored(self, array: np.ndarray) -> np.ndarray:
        """Converts an array from the layout of a Hugging Face file to ours; returns a view."""
        return array.T if self.row.transposed else array

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """Converts an array from our layout to that of a Hugging Face file; returns a view."""
        return array.T if self.row.transposed else array


def tensor_specs(config: T5GemmaConfig | T5GemmaEncoderConfig) -> list[TensorSpec]:
    """Every tensor of a T5Gemma once: the encoder's, then the decoder's, each from its embedding to its last norm.

    Args:
        config: a `T5GemmaConfig`, or a `T5GemmaEncoderConfig` for the encoder's alone.

    Returns:
        A `TensorSpec` per tensor.
    """
    specs = []
    for stack in config.stacks:
        sizes = _letters(config, stack)
        tied = getattr(config, "tie_embeddings", True)  # an encoder has no output projection
        rows = [row for row in TABLE if stack in row.stacks and not (row.untied_only and tied)]
        for per_layer, group in _runs(rows):
            for layer in range(getattr(config, stack).num_layers) if per_layer else (None,):
                specs += [_tensor(row, stack, layer, sizes) for row in group]
    return specs


def parameter_count(config: T5GemmaConfig | T5GemmaEncoderConfig) -> int:
    """The number of parameters of a model by its config, computed from the table without allocating any.

    A tied output projection counts once, as in the published counts.
    """
    return sum(math.prod(tensor.shape) for tensor in tensor_specs(config))


def _tensor(row: Row, stack: str, layer: int | None, sizes: dict[str, int]) -> TensorSpec:
    """A row with its letters, stack and layer filled in."""

    def fill(template: str) -> str:
        return template.format(s=stack, i=layer)

    shape = tuple(math.prod(sizes[letter] for letter in axis) for axis in row.letters.split())
    gemma2 = None if row.gemma2 is None else fill(row.gemma2)
    return TensorSpec(row, stack, layer, fill(row.path), fill(row.t5gemma), gemma2, shape)


def _runs(rows: Iterable[Row]) -> list[tuple[bool, list[Row]]]:
    """Groups consecutive rows: `(True, rows that each layer has)` or `(False, rows that the stack has once)`."""
    runs: list[tuple[bool, list[Row]]] = []
    for row in rows:
        if not runs or runs[-1][0] != row.per_layer:
            runs.append((row.per_layer, []))
        runs[-1][1].append(row)
    return runs


def _letters(config: T5GemmaConfig | T5GemmaEncoderConfig, stack: str) -> dict[str, int]:
    """The size of each letter in the shapes of a stack."""
    sizes = getattr(config, stack)
    return {
        "V": config.vocabulary_size,
        "D": sizes.hidden_dim,
        "E": config.encoder.hidden_dim,
        "N": sizes.num_query_heads,
        "K": sizes.num_key_value_heads,
        "H": sizes.head_dim,
        "F": sizes.intermediate_dim,
    }
