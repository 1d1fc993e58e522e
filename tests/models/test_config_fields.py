"""Every config field changes the output, or is shown to be what it says."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import backbone_of, loud_backbone
from keras import ops

from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

# A value for each field that keeps the weights' shapes.
SAME_SHAPES = {
    "sliding_window": 3,
    "layer_pattern": ("global", "sliding"),
    "query_scalar": 2.0,
    "attention_soft_cap": None,
    "rope_wavelength": 20.0,
    "norm_epsilon": 0.5,
}
# A value for each that changes them.
OTHER_SHAPES = {
    "num_layers": 3,
    "hidden_dim": 36,
    "intermediate_dim": 52,
    "num_query_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 14,
}
MODEL_FIELDS = {"final_logit_soft_cap": 2.0, "encoder_attention": "causal"}
# Two layers: one with a window, one without.
SHAPE = {"num_layers": 2}
CONFIG = tiny_config(**SHAPE)


def logits_of(backbone, inputs, **kwargs):
    return ops.convert_to_numpy(T5GemmaSeq2SeqLM(backbone)(inputs, **kwargs))


def test_fields_listed_here_are_all_there_are():
    listed = {*SAME_SHAPES, *OTHER_SHAPES, "dropout", "initializer_range"}
    assert listed == {field.name for field in dataclasses.fields(StackConfig)}
    listed = {*MODEL_FIELDS, "encoder", "decoder", "vocabulary_size", "tie_embeddings"}
    assert listed == {field.name for field in dataclasses.fields(T5GemmaConfig)}


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("field", SAME_SHAPES)
def test_stack_field_changes_the_logits_of_the_same_weights(stack, field):
    inputs = loud_inputs(CONFIG)
    changed = tiny_config(**SHAPE, **{stack: {field: SAME_SHAPES[field]}})
    difference = logits_of(loud_backbone(changed), inputs) - logits_of(loud_backbone(CONFIG), inputs)
    assert np.abs(difference).max() > 1e-2


@pytest.mark.parametrize("field", MODEL_FIELDS)
def test_model_field_changes_the_logits_of_the_same_weights(field):
    inputs = loud_inputs(CONFIG)
    changed = dataclasses.replace(CONFIG, **{field: MODEL_FIELDS[field]})
    difference = logits_of(loud_backbone(changed), inputs) - logits_of(loud_backbone(CONFIG), inputs)
    assert np.abs(difference).max() > 1e-2


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("field", OTHER_SHAPES)
def test_stack_field_changes_the_weights_of_its_stack(stack, field):
    shapes = {v.path: tuple(v.shape) for v in backbone_of(CONFIG).weights}
    changed = {
        v.path: tuple(v.shape)
        for v in backbone_of(tiny_config(**SHAPE, **{stack: {field: OTHER_SHAPES[field]}})).weights
    }
    different = {path for path in shapes.keys() | changed.keys() if shapes.get(path) != changed.get(path)}
    assert any(path.startswith(stack) for path in different)
    # The decoder's cross-attention reads the encoder's width; nothing else reaches across.
    across = {path for path in different if not path.startswith(stack)}
    reads_encoder = {p for p in shapes if "cross_attention/key" in p or "cross_attention/value" in p}
    assert across == (reads_encoder if (stack, field) == ("encoder", "hidden_dim") else set())


def test_vocabulary_size_is_the_rows_of_both_tables():
    backbone = backbone_of(tiny_config(**SHAPE, vocabulary_size=77))
    for stack in (backbone.encoder, backbone.decoder):
        assert tuple(stack.token_embedding.embeddings.shape) == (77, 32)


def test_tied_output_follows_the_decoder_embedding_and_untied_does_not():
    inputs = loud_inputs(CONFIG)
    for tied in (True, False):
        backbone = loud_backbone(tiny_config(**SHAPE, tie_embeddings=tied))
        before = logits_of(backbone, inputs)
        table = backbone.decoder.token_embedding.embeddings
        unused = 2  # no input holds it, so only the projection can read its row
        values = ops.convert_to_numpy(table).copy()
        values[unused] += 1.0
        table.assign(values)
        changed = np.abs(logits_of(backbone, inputs) - before).max(axis=(0, 1)) > 1e-3
        assert list(np.flatnonzero(changed)) == ([unused] if tied else [])


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_dropout_changes_training_and_not_inference(stack):
    inputs = loud_inputs(CONFIG)
    backbone = loud_backbone(tiny_config(**SHAPE, **{stack: {"dropout": 0.4}}))
    plain = logits_of(loud_backbone(CONFIG), inputs)
    np.testing.assert_allclose(logits_of(backbone, inputs, training=False), plain, atol=1e-5)
    first, second = (logits_of(backbone, inputs, training=True) for _ in range(2))
    assert np.abs(first - plain).max() > 1e-2
    assert np.abs(first - second).max() > 1e-2


def test_initializer_range_is_the_spread_of_fresh_weights():
    keras.utils.set_random_seed(0)
    backbone = backbone_of(tiny_config(**SHAPE, initializer_range=0.3))
    for variable in backbone.weights:
        values = ops.convert_to_numpy(variable.value)
        if values.ndim == 2:
            assert values.std() == pytest.approx(0.3, rel=0.15), variable.path
        else:
            assert not values.any(), variable.path
