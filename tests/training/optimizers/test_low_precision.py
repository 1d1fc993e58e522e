"""Weights in bfloat16 train as those in float32 do."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import backbone_of
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

from keras_t5gemma.kernels.cross_entropy.chunks import CHUNK_BYTES
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer
from keras_t5gemma.training.optimizers.factory import optimizer
from keras_t5gemma.training.optimizers.learning_rates import rate_by_width
from keras_t5gemma.training.optimizers.low_precision import is_bfloat16

# Each question has four answers: the loss ends at what nobody can know, and not at a zero that runs reach by chance.
ROWS = [(f"{a} plus {b}", str(a + b + more)) for more in range(4) for a in range(6) for b in range(6)]
PAIRS = {"encoder_text": [question for question, _ in ROWS], "decoder_text": [answer for _, answer in ROWS]}
STEPS = 300
PEAKS = {"adamw": 2e-3, "adafactor": 0.1, "muon": 2e-3}


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory):
    proto = train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    tokenizer = T5GemmaTokenizer(proto=str(proto))
    return T5GemmaSeq2SeqLMPreprocessor(tokenizer, encoder_sequence_length=10, decoder_sequence_length=5)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    # TensorFlow fills chunks up where lengths are unknown: by default with 32,000 tokens of this vocabulary.
    monkeypatch.setitem(CHUNK_BYTES, keras.config.backend(), 4 * 512 * 120)


def language_model(preprocessor, dtype):
    """A tiny model, and its weights, which are the same in each dtype."""
    config = dataclasses.replace(
        tiny_config(num_layers=1), vocabulary_size=preprocessor.tokenizer.vocabulary_size(), final_logit_soft_cap=None
    )
    keras.utils.set_random_seed(0)
    backbone = backbone_of(config, dtype=dtype)
    draw = np.random.default_rng(0)
    weights = []
    for variable in backbone.weights:
        value = draw.normal(0, 0.1, tuple(variable.shape)) * (len(variable.shape) > 1)
        variable.assign(ops.cast(value, "bfloat16"))
        weights.append(as_float32(variable))
    return T5GemmaSeq2SeqLM(backbone, preprocessor), weights


def as_float32(variable):
    return np.array(ops.convert_to_numpy(ops.cast(variable, "float32")))


def share_of_changed(lm, weights):
    changed = [(as_float32(v) != before).ravel() for v, before in zip(lm.backbone.weights, weights, strict=True)]
    return np.concatenate(changed).mean()


@pytest.mark.parametrize("name", PEAKS)
def test_300_steps_in_bfloat16_end_at_the_loss_of_float32(name, preprocessor):
    losses, shares = {}, {}
    for dtype in ("float32", "bfloat16"):
        lm, weights = language_model(preprocessor, dtype)
        lm.compile(optimizer=optimizer(name, learning_rate=PEAKS[name], steps=STEPS))
        first = lm.fit(PAIRS, batch_size=24, epochs=STEPS * 24 // len(ROWS), verbose=0).history["loss"][0]
        losses[dtype] = lm.evaluate(PAIRS, batch_size=24, verbose=0, return_dict=True)["loss"]
        shares[dtype] = share_of_changed(lm, weights)
        assert losses[dtype] < first / 4
        assert not any(is_bfloat16(variable) for variable in lm.optimizer.variables)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert shares["bfloat16"] >= 0.95 * shares["float32"]


def test_optimizers_that_would_not_move_the_weights_are_refused_when_training_begins(preprocessor):
    lm, weights = language_model(preprocessor, "bfloat16")
    for chosen in (keras.optimizers.Adam(2e-5), "adamw", keras.optimizers.SGD(1e-4)):
        lm.compile(optimizer=chosen)
        with pytest.raises(ValueError, match=r"(Adam|AdamW|SGD) does not train bfloat16 weights.*mixed_bfloat16"):
            lm.fit(PAIRS, batch_size=24, verbose=0)
    with pytest.raises(ValueError, match="does not train bfloat16 weights"):
        lm.train_on_batch(*preprocessor({name: column[:24] for name, column in PAIRS.items()}))
    # LoRA's factors are float32, and any optimizer trains them.
    lm.backbone.enable_lora(2)
    lm.compile(optimizer=keras.optimizers.Adam(1e-3))
    lm.fit(PAIRS, batch_size=72, verbose=0)
    factors = [variable for variable in lm.trainable_variables if variable.name.endswith("_b")]  # zeros to begin with
    assert all(as_float32(variable).any() for variable in factors)
    frozen = [variable for variable in lm.backbone.weights if "lora" not in variable.path]
    for variable, before in zip(frozen, weights, strict=True):
        np.testing.assert_array_equal(as_float32(variable), before)


def test_float16_weights_are_refused_for_training_and_answer(preprocessor):
    lm, _ = language_model(preprocessor, "float16")
    for chosen in ("auto", "sgd"):
        lm.compile(optimizer=chosen)
        with pytest.raises(
            ValueError, match=r'float16 weights cannot be trained.*"mixed_float16".*Received: .*, float16'
        ):
            lm.fit(PAIRS, batch_size=24, verbose=0)
    assert isinstance(lm.generate("1 plus 1", max_length=3), str)
    assert np.isfinite(lm.evaluate(PAIRS, batch_size=72, verbose=0)).all()


def test_lora_on_float16_weights_trains_in_float32_with_a_scaled_loss(preprocessor):
    lm, weights = language_model(preprocessor, "float16")
    lm.backbone.enable_lora(4)
    lm.compile(optimizer=optimizer("adamw", learning_rate=1e-2, warmup_steps=0))
    assert isinstance(lm.optimizer, keras.optimizers.LossScaleOptimizer)
    history = lm.fit(PAIRS, batch_size=72, epochs=8, verbose=0).history["loss"]
    assert history[-1] < history[0] - 0.1
    assert {variable.dtype for variable in lm.trainable_variables} == {"float32"}
    frozen = [variable for variable in lm.backbone.weights if "lora" not in variable.path]
    for variable, before in zip(frozen, weights, strict=True):
        np.testing.assert_array_equal(as_float32(variable), before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_evaluation_makes_no_state_of_an_optimizer(dtype, preprocessor):
    lm, _ = language_model(preprocessor, dtype)
    assert np.isfinite(lm.evaluate(PAIRS, batch_size=72, verbose=0)).all()
    assert np.isfinite(lm.test_on_batch(*preprocessor({name: column[:24] for name, column in PAIRS.items()}))).all()
    assert not lm.optimizer.built


def test_default_optimizer_trains_by_a_rate_for_what_is_trained(preprocessor):
    lm, weights = language_model(preprocessor, "bfloat16")
    width = lm.backbone.config.decoder.hidden_dim
    history = lm.fit(PAIRS, batch_size=72, epochs=3, verbose=0).history["loss"]  # compiled by the constructor
    assert history[-1] < history[0] - 0.01
    assert share_of_changed(lm, weights) > 0.3
    assert float(lm.optimizer.learning_rate) == pytest.approx(rate_by_width("adamw", "full", width))
    lm, _ = language_model(preprocessor, "bfloat16")
    lm.backbone.enable_lora(2)  # after the constructor compiled
    lm.fit(PAIRS, batch_size=72, epochs=1, verbose=0)
    assert float(lm.optimizer.learning_rate) == pytest.approx(rate_by_width("adamw", "lora", width))


@pytest.mark.parametrize("callback", ["scheduler", "plateau"])
def test_callbacks_set_the_rate_of_an_optimizer_with_a_schedule(callback, preprocessor):
    """Halfway the rate becomes so small that the weights stand still."""
    callback = {
        "scheduler": keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate if epoch < 1 else 0.0),
        "plateau": keras.callbacks.ReduceLROnPlateau("loss", factor=1e-9, patience=1, min_delta=1e9),
    }[callback]
    lm, _ = language_model(preprocessor, "float32")
    lm.compile(optimizer=optimizer(learning_rate=1e-2, steps=100, warmup_steps=0, weight_decay=0.0))
    moved = []
    watch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: moved.append(as_float32(lm_weight())))

    def lm_weight():
        return watch.model.backbone.decoder.token_embedding.embeddings

    lm.fit(PAIRS, batch_size=72, epochs=4, verbose=0, callbacks=[watch, callback])
    ways = [np.abs(after - before).max() for before, after in itertools.pairwise(moved)]
    assert ways[0] > 1e-3
    assert ways[2] < 1e-6
    assert float(lm.optimizer.learning_rate) < 1e-10


def test_callback_that_sets_the_rate_in_the_warm_up_is_a_warning_and_one_that_leaves_it_changes_nothing(preprocessor):
    lm, _ = language_model(preprocessor, "float32")
    lm.compile(optimizer=optimizer(learning_rate=1e-2, warmup_steps=12))
    as_it_is = keras.callbacks.LearningRateScheduler(lambda _, rate: rate)
    lm.fit(PAIRS, batch_size=72, epochs=2, verbose=0, callbacks=[as_it_is])  # 2 steps an epoch
    assert float(lm.optimizer.learning_rate) == pytest.approx(1e-2 * 4 / 12)
    halving = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    with pytest.warns(UserWarning, match="within the warm-up of 12 steps.*warmup_steps=0") as caught:
        lm.fit(PAIRS, batch_size=72, epochs=2, verbose=0, callbacks=[halving])
    assert [warning.filename for warning in caught if "warm-up" in str(warning.message)] == [__file__]
