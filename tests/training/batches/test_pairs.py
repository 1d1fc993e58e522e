"""Pairs of texts in each form that `fit` of an embedder takes."""

import itertools

import grain
import keras
import numpy as np
import pytest
from helpers.input_forms import Batches, hugging_face_dataset, slices

from keras_t5gemma.training.batches.pairs import PairArrays, pair_source

# Ten rows; the longest in each batch of 4, 4 and 2 has another length.
QUERIES = ["a b", "c", "d", "a b", "e " * 20, "f", "g", "h", "i", "j"]
DOCUMENTS = ["k", "l l", "m", "n", "k", "o", "l l", "p", "q", "r"]
NEGATIVES = ["l l", "s", "s", "t", "u", "v", "w", "x", "y", "z"]
COLUMNS = {"query": QUERIES, "document": DOCUMENTS, "negative": NEGATIVES}
LIMIT = 20


def encode(texts, name):
    del name
    return [[ord(word) for word in text.split()] for text in texts]


def arrays_of(data, multiple=1, **options):
    """The batches of data as numpy."""
    batches = pair_source(data, **options).batches(PairArrays(encode, LIMIT, multiple))
    found = itertools.islice(batches.dataset, batches.steps)
    return [keras.tree.map_structure(np.asarray, tuple(batch)) for batch in found]


def loader(columns):
    import torch

    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return torch.utils.data.DataLoader(rows, batch_size=4)


def tf_data(columns):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(columns).batch(4)


def grain_rows(columns):
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return grain.MapDataset.source(rows).batch(4)


FORMS = {
    "tuple": lambda: (tuple(COLUMNS.values()), {"batch_size": 4}),
    "arrays": lambda: ({name: np.array(column) for name, column in COLUMNS.items()}, {"batch_size": 4}),
    "other_order": lambda: (dict(reversed(COLUMNS.items())), {"batch_size": 4}),
    "hugging_face": lambda: (hugging_face_dataset(COLUMNS), {"batch_size": 4}),
    "hugging_face_stream": lambda: (hugging_face_dataset(COLUMNS).to_iterable_dataset(), {"batch_size": 4}),
    "generator": lambda: (iter(slices(COLUMNS)), {}),
    "tuples": lambda: (Batches([tuple(batch.values()) for batch in slices(COLUMNS)]), {}),
    "weights": lambda: (Batches([(batch, None, [1.0] * len(batch["query"])) for batch in slices(COLUMNS)]), {}),
    "loader": lambda: (loader(COLUMNS), {}),
    "grain": lambda: (grain_rows(COLUMNS), {}),
    "tf_data": lambda: (tf_data(COLUMNS), {}),
}


@pytest.fixture(scope="module")
def expected():
    return arrays_of(COLUMNS, batch_size=4)


def test_columns_are_padded_each_to_its_own_longest_text(expected):
    x, numbers, weights = expected[0]
    assert x["query"]["token_ids"].shape == (4, 16)
    assert x["query"]["token_ids"][0, :3].tolist() == [ord("a"), ord("b"), 0]
    assert x["query"]["padding_mask"].sum(axis=1).tolist() == [2, 1, 1, 2]
    assert x["document"]["padding_mask"][1, :3].tolist() == [1, 1, 0]
    assert weights.tolist() == [1, 1, 1, 1]
    assert numbers.shape == (4, 3)
    # Beyond the smallest length, but not beyond the limit.
    assert [batch[0]["query"]["token_ids"].shape for batch in expected] == [(4, 16), (4, 20), (2, 16)]


def test_equal_texts_have_equal_numbers(expected):
    numbers = expected[0][1]
    assert numbers[0, 0] == numbers[3, 0]  # a query twice
    assert numbers[1, 1] == numbers[0, 2]  # a document that is a hard negative elsewhere
    assert numbers[1, 2] == numbers[2, 2]
    assert len(np.unique(numbers)) == 9


@pytest.mark.parametrize("form", FORMS)
def test_form_gives_the_same_batches(form, expected):
    data, options = FORMS[form]()
    found = arrays_of(data, **options)
    assert len(found) == len(expected)
    for (x, numbers, weights), (expected_x, expected_numbers, expected_weights) in zip(found, expected, strict=True):
        keras.tree.map_structure(np.testing.assert_array_equal, x, expected_x)
        np.testing.assert_array_equal(numbers, expected_numbers)
        np.testing.assert_array_equal(weights, expected_weights)


def test_rows_in_memory_are_shuffled_together():
    keras.utils.set_random_seed(0)
    (batch,) = arrays_of(COLUMNS, batch_size=10, shuffle=True)
    first = {name: column["token_ids"][:, 0] for name, column in batch[0].items()}
    order = [[ord(text[0]) for text in DOCUMENTS].index(token) for token in first["document"]]
    assert order != sorted(order)
    pairs = {(text[0], document[0]) for text, document in zip(QUERIES, DOCUMENTS, strict=True)}
    assert set(zip(map(chr, first["query"]), map(chr, first["document"]), strict=True)) == pairs


def test_rows_that_only_fill_the_devices_are_no_candidates():
    *_, (x, numbers, weights) = arrays_of(COLUMNS, multiple=4, batch_size=4)
    assert x["query"]["token_ids"].shape == (4, 16)
    assert weights.tolist() == [1, 1, 0, 0]
    assert (numbers[2:] == -1).all()
    assert (numbers[:2] >= 0).all()


@pytest.mark.parametrize(
    ("data", "options", "named"),
    [
        ({"query": ["a"], "doc": ["b"]}, {}, "doc"),
        ({"query": ["a"], "document": ["b"], "answer": ["c"]}, {}, "answer"),
        ({"query": ["a", "b"], "document": ["c"]}, {}, "same number of rows"),
        ([("a", "b"), ("c", "d")], {}, r"tuple\(zip"),
        (("a", "b"), {}, "query"),
        ("a text", {}, "str"),
        (COLUMNS, {"y": [1] * 10}, "`y` must be None"),
        (iter(slices(COLUMNS)), {"batch_size": 4}, "batch_size"),
        (iter([{"query": ["a"], "document": ["b", "c"]}]), {}, "same number of rows"),
        (iter([({"query": ["a"], "document": ["b"]}, [1])]), {}, "Weights come third"),
        (iter([{"query": ["a"], "document": "b"}]), {}, "`document` must hold one text per row"),
        (iter([({"query": ["a"], "document": ["b"]}, None, [1.0, 2.0])]), {}, "sample_weight"),
        (iter([({"query": ["a"], "document": ["b"]}, None, [np.nan])]), {}, "sample_weight"),
    ],
)
def test_bad_data_are_named(data, options, named):
    with pytest.raises(ValueError, match=named):
        arrays_of(data, **options)


def test_data_without_end_need_a_number_of_steps():
    with pytest.raises(ValueError, match="never end"):
        pair_source(tf_data(COLUMNS).repeat(), steps_name="steps_per_epoch").batches(PairArrays(encode))
