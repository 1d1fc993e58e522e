"""Streams: in all what `generate()` gives, piece by piece, with a program that is compiled once."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

from keras_t5gemma.inference.decoding.loop import Control, resolve_sampler
from keras_t5gemma.inference.decoding.programs import decoding_stream
from keras_t5gemma.inference.logits_processors import ForbiddenTokens, NoRepeatNgrams
from keras_t5gemma.inference.programs.compiled import Programs
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

LENGTH = 21
CONFIG = tiny_config(balanced=False, num_layers=2)
PROMPT = {"encoder_text": "Why is the sky blue?", "decoder_text": "Because é"}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model with a tokenizer, whose answers are full of single bytes."""
    tokenizer = T5GemmaTokenizer(proto=train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))
    backbone = loud_backbone(tiny_config(balanced=False, num_layers=1, vocabulary_size=512))
    lm = T5GemmaSeq2SeqLM(backbone, T5GemmaSeq2SeqLMPreprocessor(tokenizer, 32, LENGTH))
    lm.compile(sampler=keras_hub.samplers.RandomSampler(seed=5, temperature=2.0))
    return lm


@pytest.fixture(scope="module")
def lm():
    """A model for ids, greedy: one for all tests, since each compiles its programs anew."""
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    lm.compile(optimizer=keras.optimizers.SGD(0.0), sampler="greedy")
    return lm


@pytest.fixture(scope="module")
def whole(lm):
    """What `generate()` gives for each of two prompts."""
    return [generated(lm, row) for row in (0, 1)]


def prompt(row=0):
    inputs = loud_inputs(CONFIG, batch=3, encoder_length=11)
    keep = inputs["encoder_padding_mask"][row] == 1
    return {"encoder_token_ids": np.pad(inputs["encoder_token_ids"][row][keep], (0, 11 - keep.sum()))} | {
        "encoder_padding_mask": np.pad(np.ones(keep.sum(), int), (0, 11 - keep.sum()))
    }


def generated(lm, row=0, stop_token_ids=None):
    outputs = lm.generate(prompt(row), max_length=LENGTH, stop_token_ids=stop_token_ids)
    return outputs["decoder_token_ids"][outputs["decoder_padding_mask"]].tolist()


def test_joined_stream_is_what_generate_gives_under_each_seed(chatty):
    options = {"max_length": LENGTH, "stop_token_ids": (1,)}
    for seed in (5, 6):
        whole = chatty.generate(PROMPT, seed=seed, **options)
        texts = list(chatty.stream(PROMPT, seed=seed, **options))
        assert "".join(texts) == whole
        assert all(texts)
        assert len(texts) > 3
        stripped = chatty.stream(PROMPT, seed=seed, strip_prompt=True, **options)
        assert f"Because é{''.join(stripped)}" == whole
    assert whole != chatty.generate(PROMPT, seed=5, **options)


def test_stream_without_a_seed_goes_on_with_the_samplers_draws(chatty):
    options = {"max_length": LENGTH, "stop_token_ids": (1,)}
    seeds = chatty.sampler.variables[0]
    state = ops.convert_to_numpy(seeds)
    whole = [chatty.generate(PROMPT, **options) for _ in range(2)]
    seeds.assign(state)
    assert ["".join(chatty.stream(PROMPT, **options)) for _ in range(2)] == whole
    assert whole[0] != whole[1]


def test_stream_with_seed_processors_and_room_is_what_generate_gives_and_leaves_the_samplers_draws(chatty):
    options = {"max_new_tokens": 9, "processors": [NoRepeatNgrams(1), ForbiddenTokens(range(108, 140))], "seed": 3}
    state = ops.convert_to_numpy(chatty.sampler.variables[0]).tolist()
    whole = chatty.generate(PROMPT, **options)
    assert "".join(chatty.stream(PROMPT, **options)) == whole
    left = chatty.stream(PROMPT, **options)
    next(left), next(left)
    assert ops.convert_to_numpy(chatty.sampler.variables[0]).tolist() == state  # between chunks, too
    assert "".join(chatty.stream(PROMPT, **{**options, "seed": 4})) != whole


def test_stream_of_ids_ends_with_the_first_stop_id(lm, whole):
    assert list(lm.stream(prompt(), max_length=LENGTH, stop_token_ids=None)) == whole[0]
    assert len(whole[0]) == LENGTH
    stop = whole[0][8]
    stopped = list(lm.stream(prompt(), max_length=LENGTH, stop_token_ids=(stop,)))
    assert stopped == whole[0][: whole[0].index(stop, 1) + 1]


def test_chunks_grow_to_their_size_and_share_one_compiled_program(lm, whole, monkeypatch):
    step, calls = lm.recorded_step, []

    def counted(*arguments):
        calls.append(1)
        return step(*arguments)

    monkeypatch.setattr(lm, "recorded_step", counted)
    monkeypatch.setattr(lm, "programs", Programs())
    assert list(lm.stream(prompt(), max_length=LENGTH, stop_token_ids=None, chunk_size=4)) == whole[0]
    compiled = len(calls)
    assert compiled
    for size in (1, 3, 100):
        assert list(lm.stream(prompt(), max_length=LENGTH, stop_token_ids=None, chunk_size=size)) == whole[0]
    # Where nothing is compiled, each token of the four streams is a call.
    expected = 4 * (LENGTH - 1) if keras.config.backend() == "torch" else compiled
    assert len(calls) == expected


def test_stream_of_chunks_waits_for_no_later_chunk(lm, monkeypatch):
    decode, ends = decoding_stream(lm, Control()), [1]
    advance = decode._advance
    monkeypatch.setattr(decode, "_advance", lambda *args, **options: ends.append(args[3]) or advance(*args, **options))
    stream = lm.stream(prompt(), max_length=LENGTH, stop_token_ids=None, chunk_size=4)
    tokens_decoded = [ends[-1] - 1 for _ in stream]
    # <bos>, then 1, 2, 4, 4, 4, 4, 1.
    assert tokens_decoded == [0, 1, 3, 3, *[7] * 4, *[11] * 4, *[15] * 4, *[19] * 4, 20]


def test_stream_given_up_or_broken_leaves_the_model_as_it_was(lm, whole, monkeypatch):
    stream = lm.stream(prompt(), max_length=LENGTH, stop_token_ids=None)
    taken = [next(stream) for _ in range(5)]
    stream.close()
    assert taken == whole[0][:5]

    def broken(*_, **__):
        raise KeyboardInterrupt

    stream = lm.stream(prompt(), max_length=LENGTH, stop_token_ids=None)
    assert [next(stream) for _ in range(2)] == whole[0][:2]
    with monkeypatch.context() as patch:
        patch.setattr(decoding_stream(lm, Control()), "_advance", broken)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert list(lm.stream(prompt(), max_length=LENGTH, stop_token_ids=None)) == whole[0]
    assert generated(lm) == whole[0]


def test_two_streams_in_turn_and_training_in_between_keep_apart(lm, whole):
    assert whole[0] != whole[1]
    streams = [lm.stream(prompt(row), max_length=LENGTH, stop_token_ids=None, chunk_size=2) for row in (0, 1)]
    got = [[], []]
    for turn in range(LENGTH):
        if turn == 4:
            inputs = loud_inputs(CONFIG, batch=1)
            lm.fit(inputs, inputs["decoder_token_ids"], verbose=0)  # needs gradients
        for tokens, stream in zip(got, streams, strict=True):
            tokens.append(next(stream))
    assert got == whole


def test_stream_follows_weights_that_change_and_variables_that_are_new():
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    before = list(lm.stream(prompt(1), max_length=LENGTH, stop_token_ids=None))
    lm.backbone.enable_lora(2)
    for variable in lm.trainable_variables:
        variable.assign(np.random.default_rng(1).normal(0, 0.3, variable.shape))
    after = list(lm.stream(prompt(1), max_length=LENGTH, stop_token_ids=None))
    assert before != after == generated(lm, 1)


@pytest.mark.parametrize("sampler", ["beam", "contrastive"])
def test_sampler_that_takes_tokens_back_is_refused_at_once(lm, sampler, monkeypatch):
    monkeypatch.setattr(lm, "sampler", resolve_sampler(sampler))
    with pytest.raises(ValueError, match=r"Use `generate\(\)`"):
        lm.stream(prompt(), max_length=LENGTH, stop_token_ids=None)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"max_length": 0}, "max_length"),
        ({"stop_token_ids": "auto"}, "preprocessor"),
        ({"inputs": {"encoder_token_ids": [[5, 6], [7, 8]]}}, "one prompt at a time. Received: 2"),
    ],
)
def test_stream_with_a_bad_argument_fails_before_its_first_step(lm, changed, named):
    with pytest.raises(ValueError, match=named):
        lm.stream(**{"inputs": prompt(), "max_length": LENGTH, "stop_token_ids": None, **changed})
