"""A recorded step on PyTorch: the numbers of the layers' own, whatever changes between two steps."""

import keras
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras import ops

from keras_t5gemma.inference.logits_processors import NoRepeatNgrams
from keras_t5gemma.inference.programs import recorded_torch as module
from keras_t5gemma.inference.programs.recorded_torch import RecordedStep, recorded
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

CONFIG = tiny_config(balanced=False, num_layers=2)
IS_TORCH = keras.config.backend() == "torch"
on_torch = pytest.mark.skipif(not IS_TORCH, reason="JAX and TensorFlow compile the whole loop: there is no recording")


def prompts(batch=3, length=11, seed=0):
    inputs = loud_inputs(CONFIG, batch=batch, encoder_length=length, seed=seed)
    return {name: x for name, x in inputs.items() if name.startswith("encoder")}


@pytest.fixture
def lm(monkeypatch):
    monkeypatch.setattr(module, "_STEPS_BEFORE", 2)
    return T5GemmaSeq2SeqLM(loud_backbone(CONFIG))


def answers(lm, inputs, **kwargs):
    # A loud model would say the same again and again.
    options = {"max_length": 14, "stop_token_ids": None, "processors": [NoRepeatNgrams(1)], **kwargs}
    return lm.generate(inputs, **options)


def recordings(lm):
    return len(lm.recorded_step._recordings)


def test_other_backends_compile_the_loop_and_record_nothing():
    def step(*args):
        return args

    assert isinstance(recorded(step, None), RecordedStep) == IS_TORCH
    assert IS_TORCH or recorded(step, None) is step


@on_torch
@pytest.mark.parametrize("sampler", ["greedy", "beam", "contrastive"])
def test_recorded_answers_are_those_of_the_layers(lm, sampler):
    inputs, found = prompts(), []
    kwargs = {"processors": ()} if sampler == "contrastive" else {"return_log_probs": True}
    for eagerly in (True, False):
        lm.compile(sampler=sampler, run_eagerly=eagerly)
        found.append(answers(lm, inputs, **kwargs))
        assert bool(recordings(lm)) != eagerly
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-5)


@on_torch
def test_compiled_recordings_give_the_answers_of_the_layers(lm):
    inputs, found = prompts(), []
    for options in ({"run_eagerly": True}, {"jit_compile": True}):
        lm.compile(sampler="greedy", **options)
        found.append(answers(lm, inputs, return_log_probs=True)["log_probs"])
    assert recordings(lm) == 1
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@on_torch
def test_each_shape_has_a_recording_and_the_oldest_goes_first(lm):
    lm.compile(sampler="greedy")
    first = answers(lm, prompts(), return_log_probs=True)
    for length in range(12, 12 + module._MOST_RECORDINGS):
        answers(lm, prompts(length=length))
    assert recordings(lm) == module._MOST_RECORDINGS
    again = answers(lm, prompts(), return_log_probs=True)
    np.testing.assert_allclose(again["log_probs"], first["log_probs"], atol=1e-5)


@on_torch
@pytest.mark.parametrize("change", ["assign", "lora", "int8"])
def test_weights_that_changed_are_those_that_a_recording_uses(lm, change):
    lm.compile(sampler="greedy")
    inputs = prompts()
    before = answers(lm, inputs, return_log_probs=True)
    if change == "assign":
        kernel = lm.backbone.decoder.blocks[0].feed_forward.gate_dense.kernel
        kernel.assign(-kernel)
    elif change == "lora":
        lm.backbone.enable_lora(2)
        for variable in lm.backbone.trainable_variables:
            if "lora" in variable.path:
                variable.assign(ops.ones(variable.shape) * 0.3)
    else:
        lm.quantize("int8")
    found = answers(lm, inputs, return_log_probs=True)
    fresh = T5GemmaSeq2SeqLM(lm.backbone)
    fresh.compile(sampler="greedy", run_eagerly=True)
    expected = answers(fresh, inputs, return_log_probs=True)
    assert np.abs(found["log_probs"] - before["log_probs"]).max() > 1e-3
    np.testing.assert_allclose(found["log_probs"], expected["log_probs"], atol=1e-5)


@on_torch
def test_two_streams_in_turn_do_not_disturb_each_other(lm):
    lm.compile(sampler="greedy")
    both = [prompts(batch=1, seed=seed) for seed in (0, 1)]
    options = {"max_length": 14, "stop_token_ids": None, "processors": [NoRepeatNgrams(1)]}
    alone = [list(lm.stream(inputs, **options)) for inputs in both]
    streams = [lm.stream(inputs, **options) for inputs in both]
    assert [list(pair) for pair in zip(*streams, strict=True)] == [list(pair) for pair in zip(*alone, strict=True)]
    assert alone[0] != alone[1]
