"""Copies of models: whole ones by `copy.deepcopy`, and what is said to `keras.models.clone_model`."""

import copy

import keras
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer

import keras_t5gemma as kt

CONFIG = tiny_config(num_layers=1, vocabulary_size=512)
PROMPT = {"encoder_text": "why?"}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    proto = train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(kt.T5GemmaTokenizer(proto=proto), 16, 16, truncate="left")
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG), preprocessor, buckets=kt.Buckets((8,), None, (1, 4)))
    lm.compile(optimizer=kt.optimizer(learning_rate=0.125, warmup_steps=0), accumulation_steps=2, sampler="top_k")
    return lm


def assert_same(model, other):
    for found, expected in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_deep_copy_is_the_same_model_with_weights_of_its_own(lm):
    twin = copy.deepcopy(lm)
    assert type(twin) is type(lm)
    assert twin.get_config() == lm.get_config()
    assert twin.get_compile_config() == lm.get_compile_config()
    assert_same(twin, lm)
    assert twin.generate(PROMPT, max_length=8, seed=1) == lm.generate(PROMPT, max_length=8, seed=1)
    before = lm.get_weights()
    twin.set_weights([np.zeros_like(weight) for weight in before])
    for found, expected in zip(lm.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("change", ["lora", "int8"])
def test_deep_copy_of_a_changed_backbone_is_changed_likewise(change):
    backbone = loud_backbone(CONFIG)
    if change == "lora":
        backbone.enable_lora(2)
    else:
        backbone.quantize("int8")
    twin = copy.deepcopy(backbone)
    assert type(twin) is type(backbone)
    assert_same(twin, backbone)
    assert [v.path for v in twin.trainable_weights] == [v.path for v in backbone.trainable_weights]


@pytest.mark.parametrize("part", ["model", "backbone"])
def test_cloning_layer_by_layer_says_how_to_copy_the_model(lm, part):
    with pytest.raises(NotImplementedError, match=r"copy\.deepcopy\(model\).*from_config.*kt\.T5GemmaSeq2SeqLM\("):
        keras.models.clone_model(lm if part == "model" else lm.backbone)


def test_new_model_by_what_the_error_says_has_new_weights_and_takes_the_old_ones(lm):
    twin = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone.from_config(lm.backbone.get_config()), lm.preprocessor)
    pairs = list(zip(twin.get_weights(), lm.get_weights(), strict=True))
    assert not any(np.array_equal(*pair) for pair in pairs)
    twin.set_weights(lm.get_weights())
    inputs = loud_inputs(CONFIG)
    np.testing.assert_allclose(twin.predict_on_batch(inputs), lm.predict_on_batch(inputs), atol=1e-6)
    assert twin.preprocessor is lm.preprocessor
