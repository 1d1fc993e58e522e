"""A `.keras` file keeps the optimizer's state of the weights that train, and is read without a complaint."""

import copy
import warnings

import keras
import numpy as np
import pytest
from helpers import saved_models

import keras_t5gemma as kt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_models.write_base(tmp_path_factory.mktemp("base"))


def train(lm):
    x = copy.copy(saved_models.INPUTS)
    lm.fit(x, x["decoder_token_ids"], sample_weight=x["decoder_padding_mask"], verbose=0)


def loaded(lm, path):
    lm.save(path)
    return keras.models.load_model(path)


def state(optimizer):
    return [keras.ops.convert_to_numpy(variable.value) for variable in optimizer.variables]


@pytest.mark.filterwarnings("error::UserWarning")
def test_optimizer_comes_back_with_its_state_or_new_if_there_is_none(base, tmp_path):
    lm = kt.T5GemmaSeq2SeqLM.from_preset(str(base))
    again = loaded(lm, tmp_path / "new.keras")
    assert not again.optimizer.built
    lm.compile()
    train(lm)
    again = loaded(lm, tmp_path / "trained.keras")
    assert len(state(lm.optimizer)) > 2
    for found, value in zip(state(again.optimizer), state(lm.optimizer), strict=True):
        np.testing.assert_array_equal(found, value)


def test_state_of_weights_that_no_longer_train_is_left_out_and_fit_still_says_so(base, tmp_path):
    lm = kt.T5GemmaSeq2SeqLM.from_preset(str(base))
    for number, change in enumerate((lambda: lm.backbone.enable_lora(2), lm.backbone.merge_lora)):
        lm.optimizer.build(lm.trainable_variables)
        change()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert not loaded(lm, tmp_path / f"{number}.keras").optimizer.built
    lm.quantize("int8")
    with pytest.warns(UserWarning, match="variables then"):
        train(lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(lm)
        assert loaded(lm, tmp_path / "trained.keras").optimizer.built


@pytest.mark.filterwarnings("error::UserWarning")
def test_weights_of_a_trained_model_load_into_a_new_one(base, tmp_path):
    lm, other = (kt.T5GemmaSeq2SeqLM.from_preset(str(base)) for _ in range(2))
    lm.optimizer.build(lm.trainable_variables)
    lm.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(saved_models.logits(other), saved_models.logits(lm))


@pytest.mark.filterwarnings("error::UserWarning")
def test_model_that_is_not_compiled_is_saved_as_that(base, tmp_path):
    lm = kt.T5GemmaSeq2SeqLM.from_preset(str(base), compile=False)
    assert not loaded(lm, tmp_path / "m.keras").compiled
