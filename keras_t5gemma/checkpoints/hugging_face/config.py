"""`config.json` of T5Gemma and Gemma 2, converted to and from our configs; every field is checked.

Only fields that change the model's function are read. A field that would change it in a way we do not compute is an
error. The sliding window is the published one: `sliding_window` counts the query's own position,
`|q - k| < sliding_window`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.checkpoints.tensor_table import TensorSpec, tensor_specs
from keras_t5gemma.config import BOS_ID, EOS_ID, PAD_ID, StackConfig, T5GemmaConfig, T5GemmaEncoderConfig

LAYER_TYPES = {"sliding_attention": "sliding", "full_attention": "global"}
# Positions that Gemma 2 was trained on. `transformers` stores the number and does not use it for default RoPE.
MAX_POSITIONS = 8192
ARCHITECTURE, ENCODER_ARCHITECTURE = "T5GemmaForConditionalGeneration", "T5GemmaEncoderModel"
# What `transformers` names a T5Gemma, and the class of this package that loads it.
ARCHITECTURES = {
    ARCHITECTURE: "T5GemmaSeq2SeqLM",
    ENCODER_ARCHITECTURE: "T5GemmaEncoder",
    "T5GemmaForSequenceClassification": "T5GemmaTextClassifier",
    "T5GemmaForTokenClassification": "T5GemmaTokenClassifier",
}
# The model type of a model with a causal encoder. `transformers` has no field for that: under its own model type it
# would silently run the encoder bidirectionally. It refuses this one.
OWN_MODEL_TYPE = "keras_t5gemma"
_REQUIRED = object()

Config = TypeVar("Config")

# Our field, Hugging Face's field, and its value if it is absent: an error, or the default of `transformers`' classes.
_FIELDS = (
    ("num_layers", "num_hidden_layers", _REQUIRED),
    ("hidden_dim", "hidden_size", _REQUIRED),
    ("intermediate_dim", "intermediate_size", _REQUIRED),
    ("num_query_heads", "num_attention_heads", _REQUIRED),
    ("num_key_value_heads", "num_key_value_heads", _REQUIRED),
    ("head_dim", "head_dim", _REQUIRED),
    ("attention_soft_cap", "attn_logit_softcapping", 50.0),
    ("norm_epsilon", "rms_norm_eps", 1e-6),
    ("initializer_range", "initializer_range", 0.02),
)
# Fields of which we compute one value only: the name, the accepted values, and the value if the field is absent.
_FIXED = (
    ("attention_bias", (False, None), False),
    ("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh"),
    ("use_bidirectional_attention", (False, None), None),
    ("rope_scaling", (None,), None),
)


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """A decoder-only Gemma 2.

    Attributes:
        stack: the decoder's `StackConfig`.
        vocabulary_size: V, rows of the embedding table.
        final_logit_soft_cap: `c` in `c * tanh(x / c)` on the output logits, or `None` for no cap.
    """

    stack: StackConfig
    vocabulary_size: int
    final_logit_soft_cap: float | None

    def __post_init__(self) -> None:
        self._t5gemma()  # Checks the fields.

    def tensors(self) -> list[TensorSpec]:
        """The model's tensors, as those of an encoder that is adapted from it; each has its Gemma 2 name."""
        return [tensor for tensor in tensor_specs(self._t5gemma()) if tensor.stack == "encoder"]

    def _t5gemma(self) -> T5GemmaConfig:
        return T5GemmaConfig(self.stack, self.stack, self.vocabulary_size, self.final_logit_soft_cap)


def read_t5gemma_config(values: Mapping[str, Any], where: str = "config.json") -> T5GemmaConfig:
    """Converts Hugging Face's config of a T5Gemma, as `transformers` 4 or 5 writes it, to a `T5GemmaConfig`.

    Args:
        values: the parsed `config.json`.
        where: the file's path, for messages.

    Raises:
        CheckpointError: if the architecture is another one, or a field is missing, inconsistent or has a value that we
            do not compute.
    """
    _check_t5gemma(values, where, (ARCHITECTURE,))
    return _read_both_stacks(values, where)


def read_stacks_config(values: Mapping[str, Any], where: str = "config.json") -> T5GemmaConfig | T5GemmaEncoderConfig:
    """Converts Hugging Face's config of any model of a T5Gemma's stacks: generator, encoder or classifier.

    Args:
        values: the parsed `config.json`.
        where: the file's path, for messages.

    Returns:
        A `T5GemmaConfig`, or a `T5GemmaEncoderConfig` if the model has no decoder.

    Raises:
        CheckpointError: as for `read_t5gemma_config`.
    """
    _check_t5gemma(values, where, tuple(ARCHITECTURES))
    if not _is_encoder_alone(values):
        return _read_both_stacks(values, where)
    encoder = _section(values, "encoder", where)
    return _build(
        T5GemmaEncoderConfig,
        where,
        encoder=_read_stack(encoder, f"{where}: encoder", values.get("dropout_rate", 0.0)),
        vocabulary_size=_vocabulary_size({**values, **encoder}, f"{where}: encoder"),
        **_own_fields(values),
    )


def _read_both_stacks(values: Mapping[str, Any], where: str) -> T5GemmaConfig:
    """`read_t5gemma_config` of any architecture with both stacks."""
    encoder, decoder = (_section(values, name, where) for name in ("encoder", "decoder"))
    vocabulary_size = _vocabulary_size(decoder, f"{where}: decoder")
    for name, section in (("encoder.vocab_size", encoder), ("vocab_size", values)):
        if section.get("vocab_size", vocabulary_size) != vocabulary_size:
            raise _wrong(where, name, section["vocab_size"], f"{vocabulary_size}, the decoder's")
    if decoder.get("cross_attention_hidden_size") not in (None, encoder.get("hidden_size")):
        expected = f"{encoder.get('hidden_size')}, the encoder's hidden_size"
        raise _wrong(where, "decoder.cross_attention_hidden_size", decoder["cross_attention_hidden_size"], expected)
    stacks = {
        name: _read_stack(stack, f"{where}: {name}", values.get("dropout_rate", 0.0))
        for name, stack in (("encoder", encoder), ("decoder", decoder))
    }
    return _build(
        T5GemmaConfig,
        where,
        vocabulary_size=vocabulary_size,
        final_logit_soft_cap=decoder.get("final_logit_softcapping", 30.0),
        tie_embeddings=values.get("tie_word_embeddings", True),
        **_own_fields(values),
        **stacks,
    )


def read_gemma2_config(values: Mapping[str, Any], where: str = "config.json") -> Gemma2Config:
    """Converts Hugging Face's config of a Gemma 2, as `transformers` 4 or 5 writes it, to a `Gemma2Config`.

    Args:
        values: the parsed `config.json`.
        where: the file's path, for messages.

    Raises:
        CheckpointError: if the architecture is another one (Gemma 1 and 3 included), or a field is missing,
            inconsistent or has a value that we do not compute.
    """
    _check_architecture(values, "gemma2", ("Gemma2ForCausalLM",), where)
    if values.get("tie_word_embeddings", True) is not True:
        raise _wrong(where, "tie_word_embeddings", values["tie_word_embeddings"], "true, as in every Gemma 2")
    stack = _read_stack(values, where, 0.0)
    return _build(
        Gemma2Config,
        where,
        stack=stack,
        vocabulary_size=_vocabulary_size(values, where),
        final_logit_soft_cap=values.get("final_logit_softcapping", 30.0),
    )


def write_t5gemma_config(
    config: T5GemmaConfig | T5GemmaEncoderConfig, dtype: str, eos_ids: Sequence[int] = (EOS_ID,)
) -> dict[str, Any]:
    """Converts a config to Hugging Face's `config.json`, for `transformers` 4.53 and later, 5 included.

    RoPE's base is written twice: as `rope_theta` for version 4 and in `rope_parameters` for version 5.

    Args:
        config: a `T5GemmaConfig`; or a `T5GemmaEncoderConfig`, whose file has no section for a decoder.
        dtype: the weights' dtype, e.g. "bfloat16".
        eos_ids: the ids at which generation stops.

    Returns:
        A JSON-ready dict.

    Raises:
        CheckpointError: if `transformers` could not compute the model.
    """
    eos_id = eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    special = {"pad_token_id": PAD_ID, "eos_token_id": eos_id, "bos_token_id": BOS_ID}
    shared = {
        "attention_dropout": 0.0,
        "classifier_dropout_rate": 0.0,
        "dropout_rate": getattr(config, config.stacks[-1]).dropout,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocabulary_size,
        "initializer_range": getattr(config, config.stacks[-1]).initializer_range,
    }
    stacks = {
        name: _write_stack(getattr(config, name), name) | {"vocab_size": config.vocabulary_size, **special}
        for name in config.stacks
    }
    if isinstance(config, T5GemmaConfig):
        shared["tie_word_embeddings"] = config.tie_embeddings
        for section in stacks.values():
            section["final_logit_softcapping"] = _optional_float(config.final_logit_soft_cap)
        stacks["decoder"]["cross_attention_hidden_size"] = config.encoder.hidden_dim
    causal = config.encoder_attention != "bidirectional"
    return {
        "architectures": [ARCHITECTURE if isinstance(config, T5GemmaConfig) else ENCODER_ARCHITECTURE],
        "model_type": OWN_MODEL_TYPE if causal else "t5gemma",
        **({"encoder_attention": config.encoder_attention} if causal else {}),
        "is_encoder_decoder": isinstance(config, T5GemmaConfig),
        **shared,
        **special,
        **stacks,
    }


def layer_pattern(types: Sequence[str]) -> tuple[str, ...]:
    """The shortest `layer_pattern` whose repetition gives the layer types; Gemma 2's alternation, if that fits.

    Args:
        types: "sliding_attention" or "full_attention" per layer.
    """
    kinds = tuple(LAYER_TYPES[kind] for kind in types)
    patterns = [tuple(LAYER_TYPES.values()), *(kinds[:length] for length in range(1, len(kinds) + 1))]
    return next(p for p in patterns if all(kind == p[i % len(p)] for i, kind in enumerate(kinds)))


def _read_stack(values: Mapping[str, Any], where: str, dropout: float) -> StackConfig:
    """Converts the section of one stack to a `StackConfig`, refusing values that we do not compute.

    Args:
        values: the stack's section.
        where: its place in the file, for messages.
        dropout: the dropout rate, if the section has none.
    """
    fields: dict[str, Any] = {}
    for ours, theirs, default in _FIELDS:
        if theirs not in values and default is _REQUIRED:
            raise CheckpointError(f"{where}: field `{theirs}` is missing.")
        fields[ours] = values.get(theirs, default)
    for name, allowed, default in _FIXED:
        if values.get(name, default) not in allowed:
            raise _wrong(where, name, values[name], allowed[0])
    if values.get("attention_dropout"):
        warn_caller(
            f"{where}: attention_dropout={values['attention_dropout']} is dropped; attention has no dropout of its own "
            f"here. Outputs are the same, training differs."
        )
    pattern = _layer_pattern(values, fields["num_layers"], where)
    if values.get("sliding_window") is not None:
        fields["sliding_window"] = values["sliding_window"]
    elif "sliding" in pattern:
        raise _wrong(where, "sliding_window", None, "a number: layers with sliding attention need it")
    query_scalar = values.get("query_pre_attn_scalar", 256)
    return _build(
        StackConfig,
        where,
        layer_pattern=pattern,
        query_scalar=None if query_scalar == fields["head_dim"] else query_scalar,
        rope_wavelength=_rope_wavelength(values, where),
        dropout=values.get("dropout_rate", dropout),
        **fields,
    )


def _layer_pattern(values: Mapping[str, Any], num_layers: int, where: str) -> tuple[str, ...]:
    """The layer pattern of a stack's section, from its `layer_types`."""
    types = values.get("layer_types")
    if types is None:
        return tuple(LAYER_TYPES.values())  # The default of `transformers`: Gemma 2's alternation.
    if not isinstance(types, list) or len(types) != num_layers:
        raise _wrong(where, "layer_types", types, f"a list of num_hidden_layers={num_layers}")
    if unknown := [kind for kind in types if not isinstance(kind, str) or kind not in LAYER_TYPES]:
        raise _wrong(where, "layer_types", unknown[0], f"only {list(LAYER_TYPES)}")
    return layer_pattern(types)


def _rope_wavelength(values: Mapping[str, Any], where: str) -> Any:
    """The base of RoPE's frequencies, from the fields of `transformers` 4 or 5; unchecked."""
    parameters = values.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or parameters.get("rope_type", "default") != "default":
        raise _wrong(where, "rope_parameters", parameters, "rope_type default")
    flat, nested = values.get("rope_theta"), parameters.get("rope_theta")
    if None not in (flat, nested) and flat != nested:
        raise _wrong(where, "rope_theta", flat, f"{nested}, as in rope_parameters")
    wavelength = nested if nested is not None else flat
    return 10_000.0 if wavelength is None else wavelength


def _write_stack(stack: StackConfig, name: str) -> dict[str, Any]:
    """Converts one stack to its section, the inverse of `_read_stack`."""
    scalar = stack.head_dim if stack.query_scalar is None else stack.query_scalar
    if scalar != int(scalar):
        raise CheckpointError(
            f"{name}: query_scalar={scalar} cannot be written: `transformers` takes whole numbers for "
            f"`query_pre_attn_scalar` only."
        )
    kinds = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    return {
        **{theirs: getattr(stack, ours) for ours, theirs, _ in _FIELDS},
        "rms_norm_eps": float(stack.norm_epsilon),
        "model_type": "t5_gemma_module",
        "attn_logit_softcapping": _optional_float(stack.attention_soft_cap),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dropout_rate": stack.dropout,
        "hidden_activation": "gelu_pytorch_tanh",
        "is_decoder": name == "decoder",
        "layer_types": [kinds[kind] for kind in stack.layer_kinds],
        "max_position_embeddings": MAX_POSITIONS,
        "query_pre_attn_scalar": int(scalar),
        "rope_theta": float(stack.rope_wavelength),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(stack.rope_wavelength)},
        "sliding_window": stack.sliding_window,
        "use_cache": True,
    }


def _check_architecture(values: Mapping[str, Any], model_type: str, architectures: Sequence[str], where: str) -> None:
    if values.get("model_type") != model_type:
        raise _wrong(where, "model_type", values.get("model_type"), repr(model_type))
    found = values.get("architectures")
    if found is None or (isinstance(found, list) and len(found) == 1 and found[0] in architectures):
        return
    expected = f"[{' or '.join(map(repr, architectures))}]"
    loader = ARCHITECTURES.get(found[0]) if isinstance(found, list) and len(found) == 1 else None
    if isinstance(loader, str):
        also = ", or for vectors of texts `T5GemmaTextEmbedder.from_preset`" if found == [ENCODER_ARCHITECTURE] else ""
        expected += f". A {found[0]} is loaded by `{loader}.from_preset`{also}"
    raise _wrong(where, "architectures", found, expected)


def _check_t5gemma(values: Mapping[str, Any], where: str, architectures: Sequence[str]) -> None:
    """Checks that a config is one of T5Gemma, of one of the architectures; a config that names none is of the first."""
    own = values.get("model_type") == OWN_MODEL_TYPE
    _check_architecture(values, OWN_MODEL_TYPE if own else "t5gemma", architectures, where)
    if ENCODER_ARCHITECTURE not in architectures and _is_encoder_alone(values):
        loader = ARCHITECTURES[ENCODER_ARCHITECTURE]
        raise _wrong(
            where, "is_encoder_decoder", False, f"true. A T5Gemma without a decoder is loaded by `{loader}.from_preset`"
        )


def _is_encoder_alone(values: Mapping[str, Any]) -> bool:
    """Whether the model of a config has no decoder. A generator has one, whatever the field says."""
    if values.get("architectures") == [ENCODER_ARCHITECTURE]:
        return True
    return values.get("architectures") != [ARCHITECTURE] and values.get("is_encoder_decoder") is False


def _own_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that only a config of this package's own model type has."""
    own = values.get("model_type") == OWN_MODEL_TYPE
    return {"encoder_attention": values.get("encoder_attention")} if own else {}


def _section(values: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The section of one stack."""
    if not isinstance(values.get(name), dict):
        raise _wrong(where, name, values.get(name), "an object")
    return values[name]


def _vocabulary_size(values: Mapping[str, Any], where: str) -> int:
    if "vocab_size" not in values:
        raise CheckpointError(f"{where}: field `vocab_size` is missing.")
    return values["vocab_size"]


def _build(cls: type[Config], where: str, **fields: Any) -> Config:
    """Builds a config; a `ValueError` about its fields becomes a `CheckpointError` that names the file."""
    try:
        return cls(**fields)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error!s:.400}") from error


def _optional_float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _wrong(where: str, field: str, found: Any, expected: Any) -> CheckpointError:
    return CheckpointError(f"{where}: field `{field}` is {found!r:.200}. Expected {expected}.")
