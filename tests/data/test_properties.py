"""Ten thousand seeded cases and more: whatever the objective, nothing of a text is lost, doubled or too long."""

import functools
import random
import warnings

import grain
import numpy as np
import pytest

from keras_t5gemma.data.objectives.by_name import RECIPES, objective
from keras_t5gemma.data.objectives.mixture import Mixture
from keras_t5gemma.data.objectives.span_corruption import Denoiser, SpanCorruption
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset

# Text has none of these, so that what is a sentinel can be told.
SENTINELS = range(10_000, 10_300)
MODES = {"R": 9_001, "S": 9_002, "X": 9_003}
EOS = 1


@functools.cache
def made(name, encoder_length, decoder_length, modes, too_few_sentinels, sentinels):
    if name == "mixture":
        parts = [
            made(recipe, encoder_length, decoder_length, modes, too_few_sentinels, sentinels) for recipe in RECIPES
        ]
        return Mixture([(part, weight) for weight, part in enumerate(parts, 1)])
    options = {}
    if name != "prefixlm":
        options = {"sentinels": SENTINELS[:sentinels], "too_few_sentinels": too_few_sentinels}
    if modes:
        options |= {"mode_token": 9_000} if name in ("prefixlm", "span_corruption") else {"mode_tokens": MODES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return objective(name, encoder_length, decoder_length, **options)


def rebuilt(example):
    """The text, from inputs and targets; fails where a sentinel is missing, used twice or out of order."""
    inputs, targets = example.inputs.tolist(), example.targets.tolist()
    if 9_000 <= inputs[0] <= 9_003:
        inputs = inputs[1:]
    if not example.complete:
        return inputs + targets
    spans = []
    for token in targets:
        if token in SENTINELS:
            assert token == SENTINELS[len(spans)]
            spans.append([])
        else:
            spans[-1].append(token)
    assert all(spans)
    text, holes = [], 0
    for token in inputs:
        if token in SENTINELS:
            assert token == SENTINELS[holes]
            text += spans[holes]
            holes += 1
        else:
            text.append(token)
    assert holes == len(spans)
    return text


@pytest.mark.parametrize("name", [*RECIPES, "mixture"])
def test_inputs_and_targets_of_2500_random_texts_rebuild_them_exactly_and_fit(name):
    rng = np.random.default_rng(0)
    for case in range(2_500):
        # A handful of settings is enough; the cases differ in the text.
        setting = np.random.default_rng(case % 40)
        lengths = (int(setting.integers(3, 160)), int(setting.integers(3, 160)))
        modes = bool(setting.integers(2))
        shortage = ("cap", "merge")[setting.integers(2)]
        recipe = made(name, *lengths, modes, shortage, int(setting.choice([1, 5, 300])))
        part = recipe.parts[rng.integers(len(recipe.parts))][0]
        # Every sixth case is as short as can be, every sixth as long.
        length = {0: 2, 1: part.raw_length, 2: 3}.get(case % 6, int(rng.integers(2, part.raw_length + 1)))
        ids = rng.integers(200, 300, min(length, part.raw_length))
        with_eos = case % 3 == 0
        if with_eos:
            # An <eos> in every hundredth place or so, but never no text at all.
            ids[rng.random(len(ids)) < 0.01] = EOS
            ids[-1] = 200
        example = part(ids, rng)
        text = rebuilt(example)
        assert len(example.inputs) <= recipe.encoder_length
        assert len(example.targets) + example.complete <= recipe.decoder_length
        assert len(example.inputs) and len(example.targets)
        # Where <eos> stand in the way of all spans, the last ids may be left out, and nothing else.
        assert text == ids.tolist() or (with_eos and text == ids[: len(text)].tolist())
        if example.complete and part.denoiser.mean_span is not None:
            assert EOS not in example.targets


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("name", RECIPES)
def test_texts_of_fewer_than_two_ids_are_refused(name, length):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        objective(name, 16, 16)(np.full(length, 200), np.random.default_rng(0))


@pytest.mark.parametrize(("mean_span", "rate"), [(3, 0.15), (8, 0.15), (3, 0.5), (12, 0.5), (32, 0.15), (64, 0.5)])
def test_share_and_mean_span_over_many_texts_with_protected_ids_are_the_recipes(mean_span, rate):
    part = SpanCorruption(Denoiser(mean_span, rate), 2048, 2048, sentinels=range(10_000, 12_000))
    rng = np.random.default_rng(0)
    corrupted = spans = total = 0
    for _ in range(200):
        ids = rng.integers(200, 300, rng.integers(900, 1100))
        # Three documents or so.
        ids[rng.integers(0, len(ids), 3)] = EOS
        targets = part(ids, rng).targets
        spans += np.sum(targets >= 10_000)
        corrupted += np.sum(targets < 10_000)
        total += len(ids)
    assert corrupted / total == pytest.approx(rate, rel=0.01)
    assert corrupted / spans == pytest.approx(mean_span, rel=0.1)


def rows(data):
    return [[array.tolist() for array in (*x.values(), y, weight)] for x, y, weight in data]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("documents", ["joined", "whole"])
def test_data_of_a_seed_is_the_same_each_time_and_anothers_is_not(documents, pack):
    rng = random.Random(0)
    texts = [[rng.randint(200, 300) for _ in range(rng.randint(1, 90))] for _ in range(200)]
    recipe = made("mixture", 48, 48, True, "cap", 300)

    def data(source):
        return pretraining_dataset(
            source, None, recipe, batch_size=2, seed=5, num_epochs=2, documents=documents, pack=pack, pack_buffer=40
        )

    expected = rows(data(texts))
    assert rows(data(texts)) == expected
    source = grain.MapDataset.source(texts)
    once = rows(data(source))
    assert rows(data(source)) == once
    assert (once == expected) == (documents == "whole")
    assert rows(pretraining_dataset(texts, None, recipe, batch_size=2, seed=6, num_epochs=2)) != expected
