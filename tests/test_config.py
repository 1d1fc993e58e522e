"""Configs: what they hold, what they refuse, and that they come back from JSON unchanged."""

import dataclasses
import json

import pytest

from keras_t5gemma.config import StackConfig, T5GemmaConfig

STACK = StackConfig(
    num_layers=3, hidden_dim=16, intermediate_dim=24, num_query_heads=4, num_key_value_heads=2, head_dim=6
)
# One changed value a field, each different from STACK's.
CHANGED = {
    "num_layers": 5,
    "hidden_dim": 20,
    "intermediate_dim": 28,
    "num_query_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 7,
    "layer_pattern": ("global", "sliding", "sliding"),
    "query_scalar": 12.5,
    "attention_soft_cap": None,
    "rope_wavelength": 500.0,
    "norm_epsilon": 1e-5,
    "dropout": 0.1,
    "initializer_range": 0.5,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(StackConfig)])
def test_stack_config_through_json_keeps_every_field(field):
    config = dataclasses.replace(STACK, **{field: CHANGED[field]})
    assert config != STACK
    assert StackConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_t5gemma_config_through_json_keeps_every_field():
    config = T5GemmaConfig(
        encoder=STACK,
        decoder=dataclasses.replace(STACK, hidden_dim=12),
        vocabulary_size=99,
        final_logit_soft_cap=None,
        encoder_attention="causal",
        tie_embeddings=False,
    )
    assert T5GemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_t5gemma_config_of_dicts_equals_one_of_stack_configs():
    assert T5GemmaConfig(STACK.to_dict(), STACK.to_dict()) == T5GemmaConfig(STACK, STACK)


def test_query_scale_without_scalar_is_that_of_the_head_size():
    assert STACK.query_scale == 6**-0.5
    assert dataclasses.replace(STACK, query_scalar=25).query_scale == 0.2


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        (("sliding", "global"), ("sliding", "global", "sliding")),
        (("global",), ("global",) * 3),
        (("sliding", "sliding", "sliding", "global"), ("sliding",) * 3),
    ],
)
def test_layer_kinds_repeat_the_pattern_from_the_first_layer(pattern, kinds):
    assert dataclasses.replace(STACK, layer_pattern=pattern).layer_kinds == kinds


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("num_layers", "hidden_dim", "intermediate_dim", "num_query_heads", "sliding_window")),
        ("num_layers", 2.0),
        ("num_layers", True),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("layer_pattern", ()),
        ("layer_pattern", ("local",)),
        ("query_scalar", 0),
        ("attention_soft_cap", -1.0),
        ("rope_wavelength", 0),
        ("norm_epsilon", float("nan")),
        ("initializer_range", float("inf")),
        ("dropout", 1.0),
        ("dropout", "0.1"),
    ],
)
def test_stack_config_with_a_bad_value_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=f"`{field}`") as error:
        dataclasses.replace(STACK, **{field: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder", "2b"),
        ("decoder", None),
        ("vocabulary_size", -1),
        ("final_logit_soft_cap", 0),
        ("encoder_attention", "sideways"),
        ("tie_embeddings", 1),
    ],
)
def test_t5gemma_config_with_a_bad_value_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=f"`{field}`") as error:
        dataclasses.replace(T5GemmaConfig(STACK, STACK), **{field: value})
    assert str(value) in str(error.value)


def test_from_dict_with_an_unknown_key_names_it():
    with pytest.raises(ValueError, match=r"no field \['hidden_size'\]"):
        StackConfig.from_dict(STACK.to_dict() | {"hidden_size": 16})


def test_from_dict_with_a_missing_key_names_it():
    values = STACK.to_dict()
    del values["hidden_dim"]
    with pytest.raises(ValueError, match=r"needs the fields \['hidden_dim'\]"):
        StackConfig.from_dict(values)


def test_config_once_made_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        STACK.num_layers = 4
