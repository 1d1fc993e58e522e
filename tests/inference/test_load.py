"""A thousand requests in a row: no memory is lost, and the same request gives the same under its seed."""

import gc
import itertools
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone

import keras_t5gemma as kt

CONFIG = tiny_config(balanced=False, num_layers=1)
COUNT, WARM = 1_000, 300
# Allocators keep pages, and libraries' caches grow a little. 700 caches for decoding would be 22 MB, programs far more.
MOST_GROWTH = 20e6


@pytest.fixture(scope="module")
def lm():
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG), buckets=kt.Buckets((32,), (8,), (4,)))
    lm.compile(sampler=kt.TopKTopPSampler(k=20, p=0.9))
    return lm


def rows(generator, count):
    lengths = generator.integers(1, 33, count)
    ids = generator.integers(3, CONFIG.vocabulary_size, (count, 32))
    return {"encoder_token_ids": ids, "encoder_padding_mask": (np.arange(32) < lengths[:, None]).astype(int)}


def answer(lm, number):
    """What the request of a number gives."""
    generator = np.random.default_rng(number)
    kind = ("generate", "samples", "stream", "score", "embed")[number % 5]
    longest, inputs = int(generator.integers(4, 9)), rows(generator, 1 if kind == "stream" else number % 4 + 1)
    options = {"stop_token_ids": (1, 9, 17), "seed": number}
    if kind == "generate":
        return lm.generate(inputs, max_length=longest, processors=[kt.RepetitionPenalty(1.2)], **options)
    if kind == "samples":
        return lm.generate(inputs, max_new_tokens=longest - 1, num_samples=2, return_log_probs=True, **options)
    if kind == "stream":
        stream = lm.stream(inputs, max_length=longest, **options)
        return list(itertools.islice(stream, longest // 2))  # given up halfway
    if kind == "score":
        return lm.score(inputs, [generator.integers(3, 128, longest - 1)] * len(inputs["encoder_token_ids"]))
    return lm.embed(inputs, "mean", batch_size=4)


def resident_bytes():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def programs(lm):
    """How many programs the model keeps, and for how many shapes they were compiled."""
    streams = lm.programs.values("stream")
    kept = [program for program in lm.programs.values() if program not in streams]
    kept += [stream._advance for stream in streams]
    count = {"jax": "_cache_size", "tensorflow": "experimental_get_tracing_count"}.get(keras.config.backend())
    return len(kept), sum(getattr(program._compiled, count)() for program in kept) if count else 0


def test_thousand_mixed_requests_lose_no_memory_and_repeat_under_their_seeds(lm):
    numbers = np.random.default_rng(0).permutation(np.arange(COUNT) % 200)
    first = {}
    for i, number in enumerate(numbers):
        given = answer(lm, int(number))
        if i < WARM or i >= COUNT - 100:
            for x, before in zip(
                keras.tree.flatten(given), keras.tree.flatten(first.setdefault(number, given)), strict=True
            ):
                np.testing.assert_array_equal(x, before)
        if i + 1 in (WARM, COUNT):
            gc.collect()
            state = resident_bytes(), len(gc.get_objects()), programs(lm)
            if i + 1 == WARM:
                warm = state
    assert state[0] - warm[0] < MOST_GROWTH
    assert state[1] - warm[1] < 700  # not one object a request
    assert state[2] == warm[2]
