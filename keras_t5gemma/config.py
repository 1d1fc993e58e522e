"""Configs of T5Gemma as plain dataclasses. Imports no Keras, so any program can read, check and write a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from keras_t5gemma.checks import check_integer_fields, is_number
from keras_t5gemma.suggestions import check_choice, did_you_mean

ATTENTION_KINDS = ("sliding", "global")
ENCODER_ATTENTIONS = ("bidirectional", "causal")
# The special pieces of Gemma's vocabulary. A decoder's first token is <bos>.
PAD_ID, EOS_ID, BOS_ID, UNKNOWN_ID = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """One stack: an encoder or a decoder with Gemma 2's block.

    Attributes:
        num_layers: number of blocks.
        hidden_dim: D, the width of the residual stream.
        intermediate_dim: F, the width inside the feed-forward.
        num_query_heads: N, a multiple of `num_key_value_heads`.
        num_key_value_heads: K.
        head_dim: H, even, because RoPE rotates it in halves.
        sliding_window: tokens a "sliding" layer sees, its own position included; 4096 in Gemma 2
            (arXiv 2408.00118, table 1). A decoder query `q` sees keys `0 <= q - k < sliding_window`, an
            encoder query `|q - k| < sliding_window`.
        layer_pattern: "sliding" or "global" per layer, repeated from the first layer to the last; Gemma 2 alternates.
        query_scalar: attention logits are scaled by `query_scalar ** -0.5`; `None` means `head_dim`, as in every
            published size.
        attention_soft_cap: `c` in `c * tanh(x / c)` on attention logits, or `None` for no cap; 50 in Gemma 2.
        rope_wavelength: base of the rotary frequencies, 10,000 in Gemma 2.
        norm_epsilon: added to the mean square in RMSNorm.
        dropout: rate on the embeddings and on every sub-layer's output, during training only.
        initializer_range: standard deviation of newly drawn kernels and embeddings; 0.02 as in `transformers`.

    Raises:
        ValueError: if a value is out of range; the message names the field.
    """

    num_layers: int
    hidden_dim: int
    intermediate_dim: int
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int = 4096
    layer_pattern: tuple[str, ...] = ATTENTION_KINDS
    query_scalar: float | None = None
    attention_soft_cap: float | None = 50.0
    rope_wavelength: float = 10_000.0
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_integer_fields(
            self,
            num_layers=1,
            hidden_dim=1,
            intermediate_dim=1,
            num_query_heads=1,
            num_key_value_heads=1,
            head_dim=1,
            sliding_window=1,
        )
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_query_heads` must be a multiple of `num_key_value_heads`. Received: num_query_heads="
                f"{self.num_query_heads}, num_key_value_heads={self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even (RoPE rotates halves). Received: head_dim={self.head_dim}.")
        object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
        if not self.layer_pattern or set(self.layer_pattern) - set(ATTENTION_KINDS):
            raise ValueError(
                f"`layer_pattern` must be a non-empty sequence of {ATTENTION_KINDS}. Received: {self.layer_pattern}."
            )
        for name in ("query_scalar", "attention_soft_cap"):
            if getattr(self, name) is not None:
                _check_positive(self, name)
        for name in ("rope_wavelength", "norm_epsilon", "initializer_range"):
            _check_positive(self, name)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={self.dropout!r}.")

    @property
    def query_scale(self) -> float:
        """The factor by which queries are scaled before the dot product."""
        return (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The attention kind of each layer, first to last: "sliding" or "global"."""
        return tuple(self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_layers))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `StackConfig.from_dict` reads them back."""
        return dataclasses.asdict(self) | {"layer_pattern": list(self.layer_pattern)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a config from a mapping of fields.

        Raises:
            ValueError: if a field is unknown, a required field is missing, or a value is out of range.
        """
        return cls(**_known_fields(cls, values))


@dataclasses.dataclass(frozen=True)
class T5GemmaEncoderConfig:
    """The encoder of a T5Gemma without its decoder.

    Attributes:
        encoder: the encoder's `StackConfig`, or a mapping of its fields.
        vocabulary_size: V, rows of the embedding table.
        encoder_attention: "bidirectional", or "causal" (an ablation in arXiv 2504.06225).

    Raises:
        ValueError: if a value is out of range; the message names the field.
    """

    encoder: StackConfig
    vocabulary_size: int = 256_000
    encoder_attention: str = "bidirectional"

    def __post_init__(self) -> None:
        _check_stack(self, "encoder")
        check_integer_fields(self, vocabulary_size=1)
        check_choice(self.encoder_attention, "encoder_attention", ENCODER_ATTENTIONS)

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks of the model: the encoder alone."""
        return ("encoder",)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `T5GemmaEncoderConfig.from_dict` reads them back."""
        return {**vars(self), "encoder": self.encoder.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a config from a mapping of fields.

        Raises:
            ValueError: if a field is unknown, a required field is missing, or a value is out of range.
        """
        return cls(**_known_fields(cls, values))


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig:
    """A whole model: an encoder, a decoder and the settings that both share.

    Attributes:
        encoder: the encoder's `StackConfig`, or a mapping of its fields.
        decoder: the decoder's `StackConfig`, or a mapping of its fields. Cross-attention has the decoder's heads and
            reads the encoder's width.
        vocabulary_size: V, rows of the embedding table; each stack has its own table.
        final_logit_soft_cap: `c` in `c * tanh(x / c)` on the output logits, or `None` for no cap; 30 in Gemma 2.
        encoder_attention: "bidirectional", or "causal" (an ablation in arXiv 2504.06225).
        tie_embeddings: whether the output projection is the decoder's embedding table.

    Raises:
        ValueError: if a value is out of range; the message names the field.
    """

    encoder: StackConfig
    decoder: StackConfig
    vocabulary_size: int = 256_000
    final_logit_soft_cap: float | None = 30.0
    encoder_attention: str = "bidirectional"
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in self.stacks:
            _check_stack(self, name)
        check_integer_fields(self, vocabulary_size=1)
        if self.final_logit_soft_cap is not None:
            _check_positive(self, "final_logit_soft_cap")
        check_choice(self.encoder_attention, "encoder_attention", ENCODER_ATTENTIONS)
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(f"`tie_embeddings` must be True or False. Received: {self.tie_embeddings!r}.")

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks of the model."""
        return ("encoder", "decoder")

    def encoder_alone(self) -> T5GemmaEncoderConfig:
        """The config of the model's encoder without the decoder."""
        return T5GemmaEncoderConfig(self.encoder, self.vocabulary_size, self.encoder_attention)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `T5GemmaConfig.from_dict` reads them back."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "encoder": self.encoder.to_dict(),
            "decoder": self.decoder.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a config from a mapping of fields.

        Raises:
            ValueError: if a field is unknown, a required field is missing, or a value is out of range.
        """
        return cls(**_known_fields(cls, values))


def _check_stack(instance: T5GemmaConfig | T5GemmaEncoderConfig, name: str) -> None:
    """Checks that a field is a `StackConfig`, and builds one from a mapping of its fields."""
    stack = getattr(instance, name)
    if isinstance(stack, Mapping):
        object.__setattr__(instance, name, StackConfig.from_dict(stack))
    elif not isinstance(stack, StackConfig):
        raise ValueError(f"`{name}` must be a StackConfig or a mapping of its fields. Received: {stack!r}.")


def _known_fields(
    cls: type[StackConfig] | type[T5GemmaConfig] | type[T5GemmaEncoderConfig], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Copies a mapping into a dict, after checking that it holds a dataclass's fields and every required one."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(
            f"{cls.__name__} has no field {unknown}. Known fields: {sorted(fields)}.{did_you_mean(unknown[0], fields)}"
        )
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise ValueError(f"{cls.__name__} needs the fields {missing}. Received: {sorted(values)}.")
    return dict(values)


def _check_positive(instance: StackConfig | T5GemmaConfig, name: str) -> None:
    """Checks that a field is a positive number, and turns numpy's numbers into Python's."""
    value = getattr(instance, name)
    if not is_number(value) or value <= 0:
        raise ValueError(f"`{name}` must be a positive number. Received: {name}={value!r}.")
    # JSON cannot hold numpy's numbers.
    object.__setattr__(instance, name, value if isinstance(value, int) else float(value))
