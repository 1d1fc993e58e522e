"""Sources mixed by weight: shares, orders, positions, workers."""

import itertools
from collections import Counter

import grain
import pytest

import keras_t5gemma as kt
from keras_t5gemma.data.pipelines.mixed_sources import mix_sources

WEB, BOOKS = [f"w{i}" for i in range(7)], [f"b{i}" for i in range(3)]


def first(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def streamed(tmp_path, name, texts):
    """A source without random access."""
    path = tmp_path / f"{name}.txt"
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    source = kt.text_source(str(path))
    assert not isinstance(source, grain.MapDataset)
    return source


@pytest.mark.parametrize("is_streamed", [False, True])
def test_each_source_has_its_share_and_comes_whole_in_new_orders(is_streamed, tmp_path):
    sources = [streamed(tmp_path, "web", WEB), streamed(tmp_path, "books", BOOKS)] if is_streamed else [WEB, BOOKS]
    mixed = mix_sources(sources, [3, 1], shuffle_buffer=7)
    found = first(mixed, 84)
    for i in range(0, 84, 4):
        assert Counter(text[0] for text in found[i : i + 4]) == {"w": 3, "b": 1}
    web = [text for text in found if text[0] == "w"]
    passes = [web[i : i + 7] for i in range(0, 63, 7)]
    assert Counter(web) == {text: 9 for text in WEB}
    assert len(set(map(tuple, passes))) > 5
    assert first(mixed, 84) == found
    assert first(mix_sources(sources, [3, 1], seed=1, shuffle_buffer=7), 84) != found


def test_sources_in_their_own_order():
    assert first(mix_sources([WEB, BOOKS], [2, 2], shuffle=False), 8) == [
        "w0",
        "b0",
        "w1",
        "b1",
        "w2",
        "b2",
        "w3",
        "b0",
    ]


def test_mixture_goes_on_from_a_saved_position(tmp_path):
    mixed = mix_sources([streamed(tmp_path, "web", WEB), BOOKS], [0.75, 0.25], shuffle_buffer=4)
    iterator = iter(mixed)
    for _ in range(11):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(20)]
    again = iter(mixed)
    again.set_state(state)
    assert [next(again) for _ in range(20)] == expected


def encoded(text):
    return [10 + ord(character) for character in text]


@pytest.mark.parametrize("documents", ["joined", "whole"])
def test_batches_of_a_mixture_do_not_depend_on_workers(documents, tmp_path):
    def batches(num_workers):
        mixed = mix_sources([streamed(tmp_path, "web", WEB), BOOKS], [3, 1])
        options = {"batch_size": 2, "shuffle": False, "documents": documents, "num_workers": num_workers}
        data = kt.pretraining_dataset(mixed, encoded, kt.PrefixLM(4, 4), **options)
        return [[x["encoder_token_ids"].tolist(), y.tolist()] for x, y, _ in first(data, 6)]

    expected = batches(0)
    assert len({str(batch) for batch in expected}) > 3
    assert batches(2) == expected


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([WEB], [1], "two or more"),
        (["web.txt", "books.txt"], [1, 1], r"pass `text_source\(...\)` of each"),
        ([WEB, BOOKS], [1], "for each of 2 sources"),
        ([WEB, BOOKS], [1, 0], "a positive number"),
        ([WEB, []], [1, 1], r"`sources`\[1\]: The source has no rows"),
    ],
)
def test_invalid_argument_is_named(sources, weights, message):
    with pytest.raises(ValueError, match=message):
        mix_sources(sources, weights)
