"""`GenerationMetrics`: metrics of generated texts in the logs of `fit`."""

import math
import re

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer

import keras_t5gemma as kt

# A small rule: the answer is the first word.
PAIRS = {"encoder_text": ["red dog", "blue fox", "red fox", "blue dog"], "decoder_text": ["red", "blue", "red", "blue"]}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A tiny preset on disk."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = kt.T5GemmaTokenizer(train_tiny_tokenizer(folder / "tokenizer.model"))
    backbone = kt.T5GemmaBackbone(**tiny_config(balanced=False, num_layers=1, vocabulary_size=512).to_dict())
    lm = kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 8, 8))
    lm.save_to_preset(str(folder / "preset"))
    return str(folder / "preset")


@pytest.fixture(scope="module")
def lm(preset):
    return kt.T5GemmaSeq2SeqLM.from_preset(preset)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_exact_match_rises_to_one_and_early_stopping_and_checkpoints_follow_it(preset, dtype, tmp_path, capsys):
    lm = kt.T5GemmaSeq2SeqLM.from_preset(preset, dtype=dtype)
    keras.utils.set_random_seed(0)
    lm.compile(optimizer=kt.optimizer("adamw", learning_rate=1e-2, warmup_steps=0), sampler="greedy")
    metrics = kt.GenerationMetrics(PAIRS, ["exact_match", "rougeL", "chrf"], samples=2, batch_size=3)
    stop = keras.callbacks.EarlyStopping("val_exact_match", mode="max", patience=6, start_from_epoch=5)
    best = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "best.weights.h5"), "val_exact_match", mode="max", save_best_only=True, save_weights_only=True
    )
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    history = lm.fit(
        {name: texts * 8 for name, texts in PAIRS.items()},
        batch_size=8,
        epochs=60,
        verbose=0,
        callbacks=[metrics, stop, best, log],
    ).history
    assert history["val_exact_match"][0] < 1
    assert len(history["val_exact_match"]) < 60  # nothing is better than 1
    assert history["val_exact_match"][-1] == history["val_rougeL"][-1] == 1
    assert history["val_chrf"][-1] == 100
    assert best.best == 1
    assert lm.generate(PAIRS["encoder_text"], strip_prompt=True) == PAIRS["decoder_text"]
    assert [entry["exact_match"] for entry in metrics.results] == history["val_exact_match"]
    assert [entry["step"] for entry in metrics.results][:2] == [4, 8]
    assert "val_rougeL" in (tmp_path / "log.csv").read_text().splitlines()[0]
    printed = capsys.readouterr().out
    assert printed.count("blue fox") == len(metrics.results)  # the second of two samples
    assert "blue dog" not in printed


def test_values_are_those_of_answers_at_the_step(lm):
    """Every 3 of 4 steps per epoch; the weights do not change."""
    lm.compile(optimizer=keras.optimizers.SGD(0.0), sampler="greedy")
    answers = lm.generate(PAIRS["encoder_text"], strip_prompt=True)
    seen = []

    def letters(predictions, references):
        seen.append((list(predictions), list(references)))
        return len("".join(predictions))

    pairs = list(zip(*PAIRS.values(), strict=True))
    metrics = kt.GenerationMetrics(pairs, [letters], every=3, samples=0, batch_size=3)
    history = lm.fit(PAIRS, batch_size=2, epochs=2, verbose=0, callbacks=[metrics]).history
    assert [entry["step"] for entry in metrics.results] == [3]
    assert seen == [(answers, PAIRS["decoder_text"])]
    assert math.isnan(history["val_letters"][0])
    assert history["val_letters"][1] == len("".join(answers))


def test_progress_is_shown_on_a_terminal_alone(lm, capsys, monkeypatch):
    lm.compile(optimizer=keras.optimizers.SGD(0.0), sampler="greedy")
    metrics = kt.GenerationMetrics(PAIRS, ["f1"], samples=0, batch_size=3)
    written = []
    for force in (None, "1"):  # by which Rich takes a file for a terminal
        if force:
            monkeypatch.setenv("FORCE_COLOR", force)
        lm.fit(PAIRS, batch_size=4, verbose=0, callbacks=[metrics])
        written.append(capsys.readouterr())
    assert written[0].err == written[0].out == ""
    assert "Generating" in written[1].err
    assert "4/4" in written[1].err


@pytest.mark.parametrize(
    "later",
    [keras.callbacks.EarlyStopping("val_f1", mode="max"), keras.callbacks.ModelCheckpoint("x.keras", "val_f1")],
    ids=lambda callback: type(callback).__name__,
)
def test_order_of_callbacks_that_would_miss_the_values_is_refused(lm, later):
    metrics = kt.GenerationMetrics(PAIRS, ["f1"])
    with pytest.raises(ValueError, match=f"must have GenerationMetrics before {type(later).__name__}"):
        lm.fit(PAIRS, verbose=0, callbacks=[later, metrics])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": {"encoder_text": ["a"]}}, "`validation` must be"),
        ({"validation": [("a", "b", "c")]}, "`validation` must be"),
        ({"validation": []}, "`validation` must be"),
        ({"validation": [("a", 3)]}, "must have texts as answers. Received: 3"),
        ({"metrics": ["rougel"]}, "Did you mean 'rougeL'?"),
        ({"every": 0}, "a number of steps. Received: every=0"),
        ({"samples": -1}, "samples"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kt.GenerationMetrics(**{"validation": PAIRS, **arguments})
    with pytest.raises(TypeError, match="'beams'"):
        kt.GenerationMetrics(PAIRS, beams=3)


def test_name_that_the_logs_have_is_refused(lm):
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    metrics = kt.GenerationMetrics(PAIRS, ["accuracy"], samples=0)
    with pytest.raises(ValueError, match="have 'val_accuracy' already"):
        lm.fit(PAIRS, validation_data=PAIRS, verbose=0, callbacks=[metrics])


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ValueError, r"'mine' must return a number. Received: \[1.0\]"),
        (None, RuntimeError, "'mine' raised KeyE"),
    ],
)
def test_function_that_fails_is_named(returned, error, message, lm):
    def mine(predictions, references):
        return returned if returned else {}["missing"]

    lm.compile(optimizer=keras.optimizers.SGD(0.0), sampler="greedy")
    with pytest.raises(error, match=message):
        lm.fit(PAIRS, batch_size=4, verbose=0, callbacks=[kt.GenerationMetrics(PAIRS, [mine], samples=0, batch_size=3)])


def test_model_without_preprocessor_is_refused():
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(num_layers=1)))
    inputs = {"encoder_token_ids": np.ones((1, 3), int), "decoder_token_ids": np.ones((1, 3), int)}
    with pytest.raises(ValueError, match="has no `preprocessor`"):
        lm.fit(inputs, np.ones((1, 3), int), verbose=0, callbacks=[kt.GenerationMetrics(PAIRS)])
