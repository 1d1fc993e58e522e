"""Logits processors and the top-k top-p sampler on random numbers: equal to `transformers`', and clear refusals."""

import numpy as np
import pytest
import transformers
from keras import ops
from transformers.generation import logits_process

import keras_t5gemma as kt
from keras_t5gemma.inference.logits_processors import Request, Sequences, application_order, check_processors

VOCABULARY_SIZE, ROWS, LENGTH = 12, 4, 20
STOPS = (1, 7)
# Few ids, so that tokens and n-grams come again and again.
IDS = np.random.default_rng(0).integers(0, 4, (ROWS, LENGTH)).astype("int32")
LOGITS = (3 * np.random.default_rng(1).standard_normal((ROWS, VOCABULARY_SIZE))).astype("float32")
PEERS = {
    "repetition": (kt.RepetitionPenalty(1.7), logits_process.RepetitionPenaltyLogitsProcessor(1.7)),
    "encouraged": (kt.RepetitionPenalty(0.6), logits_process.RepetitionPenaltyLogitsProcessor(0.6)),
    "1-gram": (kt.NoRepeatNgrams(1), logits_process.NoRepeatNGramLogitsProcessor(1)),
    "2-gram": (kt.NoRepeatNgrams(2), logits_process.NoRepeatNGramLogitsProcessor(2)),
    "3-gram": (kt.NoRepeatNgrams(3), logits_process.NoRepeatNGramLogitsProcessor(3)),
    "forbidden": (kt.ForbiddenTokens([9, 2, 9]), logits_process.SuppressTokensLogitsProcessor([9, 2])),
    "minimum": (kt.MinimumLength(8), logits_process.MinNewTokensLengthLogitsProcessor(3, 8, list(STOPS))),
    "first": (kt.ForcedTokens({-17: 5}), logits_process.ForcedEOSTokenLogitsProcessor(4, 5)),
    "last": (kt.ForcedTokens({-1: 7}), logits_process.ForcedEOSTokenLogitsProcessor(LENGTH, 7)),
}


def run(processors, index, ids=IDS, prompt_lengths=3):
    rows, length = ids.shape
    lengths = np.full((rows,), prompt_lengths, "int32"), np.full((rows,), length, "int32")
    sequences = Sequences(ops.convert_to_tensor(ids), index, *map(ops.convert_to_tensor, lengths), STOPS)
    logits = ops.convert_to_tensor(LOGITS)
    for processor in processors:
        logits = processor(logits, sequences)
    return ops.convert_to_numpy(logits)


def peer_run(processors, index):
    import torch

    logits = torch.from_numpy(LOGITS.copy())
    for processor in processors:
        logits = processor(torch.from_numpy(IDS[:, :index].astype("int64")), logits)
    return logits.numpy()


@pytest.mark.parametrize("name", PEERS)
def test_processor_gives_the_numbers_of_transformers(name):
    processor, peer = PEERS[name]
    for index in (1, 3, 10, 11, 19):
        np.testing.assert_allclose(run([processor], index), peer_run([peer], index), rtol=1e-6)


def test_processors_compose_as_those_of_transformers():
    names = ("repetition", "3-gram", "forbidden", "minimum", "last")
    processors, peers = zip(*(PEERS[name] for name in names), strict=True)
    for index in (5, 12, 19):
        np.testing.assert_allclose(run(processors, index), peer_run(peers, index), rtol=1e-6)


def test_ngram_longer_than_the_sequence_forbids_nothing():
    np.testing.assert_array_equal(run([kt.NoRepeatNgrams(LENGTH + 1)], 19), LOGITS)


def test_forced_positions_count_from_each_rows_own_prompt():
    logits = run([kt.ForcedTokens({0: 5, 2: 6})], 6, prompt_lengths=np.array([6, 4, 5, 1]))
    np.testing.assert_array_equal(logits[0], np.where(np.arange(VOCABULARY_SIZE) == 5, 0, -np.inf))
    np.testing.assert_array_equal(logits[1], np.where(np.arange(VOCABULARY_SIZE) == 6, 0, -np.inf))
    np.testing.assert_array_equal(logits[2:], LOGITS[2:])


def test_forced_tokens_come_last_and_all_others_in_their_order():
    others = [kt.NoRepeatNgrams(2), kt.RepetitionPenalty(2.0)]
    forced = kt.ForcedTokens({0: 3})
    assert application_order([forced, *others]) == (*others, forced)


def test_equal_processors_are_one_key():
    assert len({kt.ForbiddenTokens([3, 2]), kt.ForbiddenTokens((2, 3, 3)), kt.ForbiddenTokens(np.array([2, 3]))}) == 1
    assert len({kt.ForcedTokens({0: 1, 2: 3}), kt.ForcedTokens({2: 3, 0: 1})}) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kt.RepetitionPenalty(0), "`penalty` must be above 0"),
        (lambda: kt.RepetitionPenalty("much"), "`penalty` must be above 0"),
        (lambda: kt.NoRepeatNgrams(0), "`n` must be a positive integer"),
        (lambda: kt.ForbiddenTokens([]), "`ids` must hold at least one"),
        (lambda: kt.ForbiddenTokens("the"), "`ids` must be a sequence"),
        (lambda: kt.ForbiddenTokens([1.5]), "`ids` must be a sequence of integers"),
        (lambda: kt.MinimumLength(-1), "`tokens` must be a positive integer"),
        (lambda: kt.ForcedTokens([1]), "`tokens` must map positions to ids"),
        (lambda: kt.TopKTopPSampler(k=0), "`k` must be a positive integer"),
        (lambda: kt.TopKTopPSampler(temperature=-1), "`temperature` must be a number above 0"),
        (lambda: kt.TopKTopPSampler(temperature="hot"), "`temperature` must be a number above 0"),
        (lambda: kt.TopKTopPSampler(p=1.5), r"`p` must be in \(0, 1\]"),
    ],
)
def test_option_out_of_range_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("processors", "message"),
    [
        (kt.RepetitionPenalty(1.2), "`processors` must be a list"),
        ([kt.RepetitionPenalty], "`processors` must be a list of callables"),
        ([kt.ForbiddenTokens([3, 12])], r"`ForbiddenTokens` must hold ids in \[0, 12\). Received: \[12\]"),
        ([kt.ForbiddenTokens(range(12))], "must leave at least one id"),
        ([kt.ForcedTokens({0: -1})], r"`ForcedTokens` must hold ids in \[0, 12\). Received: \[-1\]"),
        ([kt.ForcedTokens({9: 2})], r"positions that no row reaches, of 9 tokens. Received: \[9\]"),
        ([kt.MinimumLength(7)], "asks for 7 tokens, and `max_length` or `max_new_tokens` leaves room for 6"),
        ([kt.ForcedTokens({0: 2}), kt.ForbiddenTokens([2])], r"contradict each other. Received in both: \[2\]"),
        ([kt.MinimumLength(5), kt.ForcedTokens({4: 1})], r"ends a row before `MinimumLength\(5\)`"),
    ],
)
def test_processors_that_cannot_be_met_are_refused(processors, message):
    with pytest.raises(ValueError, match=message):
        check_processors(processors, Request(VOCABULARY_SIZE, np.array([6, 9]), STOPS))


@pytest.mark.parametrize(("k", "p"), [(None, None), (5, None), (None, 0.7), (5, 0.7), (3, 1e-6), (99, 1.0)])
def test_sampler_draws_from_what_transformers_leaves(k, p):
    import torch

    temperature = 1.8
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [] if k is None else [transformers.TopKLogitsWarper(k)]
    warpers += [] if p is None else [transformers.TopPLogitsWarper(p)]
    expected = torch.from_numpy(LOGITS)
    for warper in warpers:
        expected = warper(None, expected)
    expected = torch.softmax(expected, -1).numpy()

    sampler = kt.TopKTopPSampler(k=k, p=p, temperature=temperature)
    log_probs, ids = sampler.candidates(sampler.compute_probabilities(ops.convert_to_tensor(LOGITS)))
    probabilities = np.exp(ops.convert_to_numpy(log_probs))
    got = np.zeros_like(expected)
    ids = np.broadcast_to(np.arange(VOCABULARY_SIZE), got.shape) if ids is None else ops.convert_to_numpy(ids)
    np.put_along_axis(got, ids, probabilities / probabilities.sum(axis=1, keepdims=True), axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_sampler_draws_as_often_as_the_probabilities_say():
    sampler = kt.TopKTopPSampler(k=3, p=0.9, seed=0)
    probabilities = np.repeat([[0.3, 0.05, 0.2, 0.35, 0.1]], 4000, axis=0).astype("float32")
    drawn = ops.convert_to_numpy(sampler.get_next_token(ops.convert_to_tensor(probabilities)))
    shares = np.bincount(drawn, minlength=5) / 4000
    np.testing.assert_allclose(shares, np.array([0.3, 0, 0.2, 0.35, 0]) / 0.85, atol=0.03)  # 4 standard deviations


def test_sampler_is_made_again_from_its_config():
    sampler = kt.TopKTopPSampler(k=3, p=0.9, temperature=0.7, seed=5)
    again = kt.TopKTopPSampler.from_config(sampler.get_config())
    assert again.get_config() == {"k": 3, "p": 0.9, "temperature": 0.7, "seed": 5}
