"""Decoding loops that TensorFlow hands to XLA, as it does those of large models: what they give otherwise."""

import keras
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone

from keras_t5gemma.inference.logits_processors import NoRepeatNgrams
from keras_t5gemma.inference.programs import compiled as program
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

CONFIG = tiny_config(balanced=False, num_layers=2)
pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="JAX compiles all it generates by XLA, and PyTorch nothing"
)


@pytest.fixture
def lm():
    return T5GemmaSeq2SeqLM(loud_backbone(CONFIG))


def answers(lm, **kwargs):
    inputs = {name: x for name, x in loud_inputs(CONFIG, batch=3).items() if name.startswith("encoder")}
    # A loud model would say the same again and again.
    options = {"max_length": 14, "stop_token_ids": None, "processors": [NoRepeatNgrams(1)], **kwargs}
    return lm.generate(inputs, **options)


def is_compiled(lm):
    (made,) = lm.programs.values("generate")
    return made._compiled is not None and made._compiled._jit_compile


@pytest.mark.parametrize("sampler", ["greedy", "beam", "contrastive"])
def test_answers_are_the_same(lm, monkeypatch, sampler):
    kwargs = {"processors": ()} if sampler == "contrastive" else {"return_log_probs": True}
    found = []
    for weights in (10**9, 0):
        monkeypatch.setattr(program, "_WEIGHTS_FOR_XLA", weights)
        lm.compile(sampler=sampler)
        found.append(answers(lm, **kwargs))
        assert is_compiled(lm) == (weights == 0)
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-5)


def test_draws_are_those_of_a_seed(lm, monkeypatch):
    """XLA's random numbers are others than TensorFlow's own."""
    monkeypatch.setattr(program, "_WEIGHTS_FOR_XLA", 0)
    lm.compile(sampler="random")
    first, second, again = (answers(lm, seed=seed)["decoder_token_ids"].tolist() for seed in (3, 4, 3))
    assert first == again != second
    inputs = {name: x[:1] for name, x in loud_inputs(CONFIG, batch=1).items() if name.startswith("encoder")}
    options = {"max_length": 14, "stop_token_ids": None, "seed": 3}
    assert lm.generate(inputs, **options)["decoder_token_ids"][0].tolist() == list(lm.stream(inputs, **options))


def test_stream_is_the_same(lm, monkeypatch):
    inputs = {name: x[:1] for name, x in loud_inputs(CONFIG, batch=1).items() if name.startswith("encoder")}
    found = []
    for weights in (10**9, 0):
        monkeypatch.setattr(program, "_WEIGHTS_FOR_XLA", weights)
        lm.compile(sampler="greedy")
        found.append(list(lm.stream(inputs, max_length=14, stop_token_ids=None)))
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [{"jit_compile": False}, {"run_eagerly": True}])
def test_who_asks_for_none_gets_none(lm, monkeypatch, options):
    monkeypatch.setattr(program, "_WEIGHTS_FOR_XLA", 0)
    lm.compile(sampler="greedy", **options)
    answers(lm)
    assert not is_compiled(lm)


def test_saved_model_compiles_as_it_did(lm, monkeypatch):
    monkeypatch.setattr(program, "_WEIGHTS_FOR_XLA", 0)
    for asked, expected in (("auto", True), (False, False)):
        lm.compile(sampler="greedy", jit_compile=asked)
        again = T5GemmaSeq2SeqLM(lm.backbone)
        again.compile_from_config(lm.get_compile_config())
        assert program.by_xla(again) == expected
