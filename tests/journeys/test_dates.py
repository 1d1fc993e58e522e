"""Whole stories, as a user goes through them, each ending in a number that only a working product gives.

A tokenizer and a toy Gemma 2 are trained, the Gemma 2 becomes a T5Gemma, and that learns to write dates as ISO 8601. It
is asked for 200 dates that it has never seen. A guess is right once in some 36,525 times, so a product that does not
train, loads other weights, or decodes wrongly has 0 of 200 right; one that trains only halfway has at most `HALFWAY`.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_t5gemma as kt
from keras_t5gemma.config import StackConfig
from keras_t5gemma.demo.corpus import Corpus
from keras_t5gemma.demo.dates import date_pairs, split_dates
from keras_t5gemma.demo.pretraining import pretrain_gemma2, save_gemma2
from keras_t5gemma.demo.settings import TOY, Training

FORMS = ("{date:%B} {date.day}, {date.year}", "{date:%d-%b-%Y}", "{date:%a, %d %b %Y}")
VOCABULARY = 500
STACK = StackConfig(1, 64, 192, 4, 2, 16, sliding_window=64)
BATCH = 64
FIRST, SECOND, LORA = 60, 200, 120  # steps of each half of the fine-tuning, and of LoRA in place of the second
LONGEST = 16, 12  # pieces of a prompt and of an answer
TRAIN, HELD_OUT = split_dates()
QUESTIONS = date_pairs(HELD_OUT, seed=1, forms=FORMS)
HALFWAY = 60
BAR = 150  # by seed and backend, each dtype ended at 175 to 200
LORA_RATE = 1e-2


def lessons(skip, steps):
    """Pairs for some steps, of dates that come after the first so many steps'."""
    return date_pairs(TRAIN[skip * BATCH :], steps * BATCH, seed=2 + skip, forms=FORMS)


def optimizer(learning_rate, steps):
    # Over so few steps the usual beta_2 of 0.999 would remember the first gradients to the end.
    return kt.optimizer("adamw", learning_rate=learning_rate, steps=steps, warmup_steps=10, beta_2=0.99)


def fine_tuned(lm, pairs, optimizer):
    """Compiles and fits on texts, as the README does, and returns the model."""
    lm.compile(optimizer=optimizer)
    lm.fit(pairs, batch_size=BATCH, verbose=0)
    return lm


def right(lm):
    """How many of the 200 answers are right to the last character."""
    answers = lm.generate(QUESTIONS["encoder_text"])
    return sum(answer == truth for answer, truth in zip(answers, QUESTIONS["decoder_text"], strict=True))


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    """(folder, loss) of a toy Gemma 2, pretrained on lines such as "05-Mar-2024 is 2024-03-05"."""
    folder = tmp_path_factory.mktemp("gemma2") / "preset"
    lines = [
        tuple(f"{written} is {iso}" for written, iso in zip(*pairs.values(), strict=True))
        for pairs in (date_pairs(TRAIN[-3000:], seed=4, forms=FORMS), QUESTIONS)
    ]
    proto = kt.train_tokenizer(lines[0], VOCABULARY)
    settings = dataclasses.replace(TOY, vocabulary_size=VOCABULARY, pretraining_length=48)
    keras.utils.set_random_seed(0)
    backbone, loss = pretrain_gemma2(STACK, Corpus(*lines), proto, settings, Training(40, 32, 1e-2))
    save_gemma2(backbone, proto, folder)
    return folder, loss


@pytest.fixture(scope="module")
def halfway(gemma2, tmp_path_factory):
    """(folder, right answers) of a T5Gemma made of it, halfway through its fine-tuning."""
    folder = tmp_path_factory.mktemp("halfway") / "preset"
    keras.utils.set_random_seed(0)
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(kt.T5GemmaTokenizer.from_preset(str(gemma2[0])), *LONGEST)
    lm = kt.T5GemmaSeq2SeqLM(kt.adapt_gemma2(str(gemma2[0])), preprocessor)
    fine_tuned(lm, lessons(0, FIRST), optimizer(8e-3, FIRST + SECOND)).save_to_preset(str(folder))
    return folder, right(lm)


@pytest.fixture(scope="module")
def finished(halfway):
    """The model after the second half, in float32."""
    lm = kt.T5GemmaSeq2SeqLM.from_preset(str(halfway[0]))
    return fine_tuned(lm, lessons(FIRST, SECOND), optimizer(5e-3, SECOND))


@pytest.fixture(scope="module")
def saved(finished, tmp_path_factory):
    """{format: folder} of the finished model."""
    folder = tmp_path_factory.mktemp("saved")
    finished.save_to_preset(str(folder / "keras"))
    kt.export_to_hugging_face(finished, folder / "hugging_face")
    return {"keras": folder / "keras", "hugging_face": folder / "hugging_face"}


def test_gemma2_pretrained_here_predicts_the_lines_it_never_saw(gemma2):
    # A guess among all pieces, which is what an untrained one gives, is 6.15 nats.
    assert gemma2[1] < 3.0


def test_t5gemma_in_float32_answers_dates_it_never_saw(halfway, finished):
    assert halfway[1] <= HALFWAY
    assert right(finished) >= BAR


@contextlib.contextmanager
def loaded(folder, way, dtype):
    """The model of a folder in a dtype, said by `floatx`, by the policy for all layers, or by the argument."""
    try:
        if way == "floatx":
            keras.config.set_floatx(dtype)
        if way in ("floatx", "policy"):  # a new process takes its policy from `floatx`; this one has one already
            keras.config.set_dtype_policy(dtype)
        lm = kt.T5GemmaSeq2SeqLM.from_preset(str(folder), **({"dtype": dtype} if way == "argument" else {}))
        assert lm.backbone.dtype_policy.name == dtype
        yield lm
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(("way", "dtype"), [("floatx", "bfloat16"), ("policy", "mixed_float16")])
def test_t5gemma_in_half_precision_learns_as_in_float32(halfway, way, dtype):
    with loaded(halfway[0], way, dtype) as lm:
        assert right(fine_tuned(lm, lessons(FIRST, SECOND), optimizer(5e-3, SECOND))) >= BAR
        loss = lm.evaluate(QUESTIONS, batch_size=len(HELD_OUT), verbose=0)[0]
        assert lm.test_on_batch(QUESTIONS, return_dict=True)["loss"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(("way", "dtype"), [("floatx", "float16"), ("policy", "bfloat16"), ("argument", "float16")])
def test_finished_model_answers_and_scores_in_half_precision(finished, saved, way, dtype):
    prompts, truths = (texts[:50] for texts in QUESTIONS.values())
    with loaded(saved["keras"], way, dtype) as lm:
        assert right(lm) >= BAR
        scores = lm.score(prompts, truths)["log_likelihood"]
        np.testing.assert_allclose(scores, finished.score(prompts, truths)["log_likelihood"], atol=0.3, rtol=0.05)


def test_quantized_model_answers(saved):
    lm = kt.T5GemmaSeq2SeqLM.from_preset(str(saved["keras"]))
    lm.quantize("int8")
    assert right(lm) >= BAR


def test_lora_learns_and_leaves_the_weights_as_they_were(halfway, tmp_path):
    lm = kt.T5GemmaSeq2SeqLM.from_preset(str(halfway[0]))
    before = {weight.path: keras.ops.convert_to_numpy(weight) for weight in lm.backbone.weights}
    lm.backbone.enable_lora(8)
    loss = lm.evaluate(QUESTIONS, verbose=0)[0]
    fine_tuned(lm, lessons(FIRST, LORA), optimizer(LORA_RATE, LORA))
    assert lm.evaluate(QUESTIONS, verbose=0)[0] < 0.9 * loss
    for weight in lm.backbone.weights:
        if weight.path in before:
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), before[weight.path])
    kt.save_lora(lm, tmp_path / "adapter")
    again = kt.T5GemmaSeq2SeqLM.from_preset(str(halfway[0]))
    kt.load_lora(again, tmp_path / "adapter")
    assert again.generate(QUESTIONS["encoder_text"]) == lm.generate(QUESTIONS["encoder_text"])


@pytest.mark.parametrize("form", ["keras", "hugging_face"])
def test_command_line_on_another_backend_gives_the_answers_given_here(finished, saved, form):
    other = {"jax": "torch", "tensorflow": "jax", "torch": "tensorflow"}[keras.config.backend()]
    prompts = QUESTIONS["encoder_text"][:40]
    program = [sys.executable, "-c", "from keras_t5gemma.cli import app; app()"]
    command = [*program, "generate", saved[form], *prompts, "--max-length", "12"]
    environment = {**os.environ, "KERAS_BACKEND": other}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.splitlines() == finished.generate(prompts)


def test_stream_adds_up_to_the_right_answer(finished):
    pieces = [list(finished.stream(prompt)) for prompt in QUESTIONS["encoder_text"][:10]]
    assert all(len(parts) > 1 for parts in pieces)
    assert ["".join(parts) for parts in pieces] == finished.generate(QUESTIONS["encoder_text"][:10])


def test_score_of_the_right_answer_is_the_highest(finished):
    prompts, truths = QUESTIONS["encoder_text"], QUESTIONS["decoder_text"]
    # Another date's, and the right one with day and month exchanged.
    wrong = [truths[1:] + truths[:1], [f"{iso[:5]}{iso[8:]}-{iso[5:7]}" for iso in truths]]
    likelihoods = [finished.score(prompts, answers)["log_likelihood"] for answers in (truths, *wrong)]
    exchanged = np.array([truth != other for truth, other in zip(truths, wrong[1], strict=True)])
    assert (likelihoods[0] > likelihoods[1]).sum() >= BAR
    assert (likelihoods[0] > likelihoods[2])[exchanged].mean() >= BAR / len(truths)
