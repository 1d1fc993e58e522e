"""What a teacher reads is the text an example was made of, and each label's logits stand at the token before it."""

import warnings

import grain
import numpy as np
import pytest

from keras_t5gemma.data.objectives.example import GEMMA_SPECIAL_IDS, model_arrays
from keras_t5gemma.data.objectives.mixture import Mixture
from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.objectives.span_corruption import Denoiser, SpanCorruption
from keras_t5gemma.data.objectives.ul2 import UL2
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset
from keras_t5gemma.data.pipelines.teacher_view import TeacherView, distillation_dataset

MODES = {"R": 9_001, "S": 9_002, "X": 9_003}
SENTINELS = range(10_000, 10_040)


def view(example, objective, encoder_length, decoder_length):
    """One row of the teacher's view, and its weights."""
    x, labels, weights = model_arrays(example, encoder_length, decoder_length)
    batch = {name: array[None] for name, array in x.items()}, labels[None], weights[None]
    _, y, weights = TeacherView(objective, GEMMA_SPECIAL_IDS)(batch)
    return {name: array[0] for name, array in y.items()}, weights[0]


def test_prefix_lm_in_numbers():
    objective = PrefixLM(4, 5)
    y, _ = view(objective(np.arange(51, 57), None), objective, 4, 5)
    assert y["labels"].tolist() == [53, 54, 55, 56, 0]
    assert y["teacher_token_ids"].tolist() == [2, 51, 52, 53, 54, 55, 56, 0, 0]
    assert y["teacher_padding_mask"].tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert y["teacher_positions"].tolist() == [2, 3, 4, 5, -1]


def test_span_corruption_in_numbers():
    objective = SpanCorruption(Denoiser(2, 0.5), 6, 6, sentinels=[7])
    example = type(objective(np.arange(51, 55), np.random.default_rng(0)))
    y, _ = view(example(np.array([51, 52, 7, 55]), np.array([7, 53, 54]), complete=True), objective, 6, 6)
    assert y["labels"].tolist() == [7, 53, 54, 1, 0, 0]
    assert y["teacher_token_ids"][:6].tolist() == [2, 51, 52, 53, 54, 55]
    assert y["teacher_padding_mask"].tolist() == [1] * 6 + [0] * 6
    assert y["teacher_positions"].tolist() == [-1, 2, 3, -1, -1, -1]


def objectives():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"mode_tokens": MODES, "sentinels": SENTINELS}
        return {
            "prefixlm": PrefixLM(24, 16),
            "prefixlm_mode": PrefixLM(24, 16, mode_token=9_000),
            "span": SpanCorruption(Denoiser(3, 0.5), 24, 24, sentinels=SENTINELS, mode_token=9_000),
            "ul2": UL2(32, 24, **options),
            "t5gemma2": UL2(24, 32, mixture="t5gemma2", **options),
            "merged": UL2(24, 32, **{**options, "sentinels": SENTINELS[:2]}, too_few_sentinels="merge"),
            "mixture": Mixture([(PrefixLM(24, 24, mode_token=9_000), 1), (UL2(24, 24, sentinels=SENTINELS), 2)]),
        }


@pytest.mark.parametrize(("name", "objective"), objectives().items(), ids=objectives())
def test_view_of_many_random_texts_is_the_text_with_each_label_behind_its_position(name, objective):
    """A text may hold control tokens and `<eos>` anywhere; a token's place is found by counting, not by its value."""
    generator = np.random.default_rng(len(name))
    for case in range(400):
        part = objective.parts[generator.integers(len(objective.parts))][0]
        # Few different tokens, so that a place that is wrong is not right by chance more often than need be.
        text = generator.integers(110, 9_000, size=generator.integers(2, part.raw_length + 1)).astype("int32")
        if case % 4 == 0:
            text[generator.random(len(text)) < 0.1] = 1
            text[0] = 200
        example = part(text, generator)
        y, weights = view(example, objective, objective.encoder_length, objective.decoder_length)
        length = int(y["teacher_padding_mask"].sum())
        assert y["teacher_padding_mask"][:length].all()
        ids = y["teacher_token_ids"]
        assert ids[0] == 2
        whole = np.append(ids[1:length], y["labels"][len(example.targets) - 1])[: len(text)]
        # Only where protected ids lie too close are a text's last ids left out.
        read = ids[1:length] if length - 1 <= len(text) else whole
        np.testing.assert_array_equal(read, text[: len(read)])
        positions, labels = y["teacher_positions"], y["labels"]
        known = positions >= 0
        np.testing.assert_array_equal(labels[known], text[positions[known]])
        assert len(set(positions[known].tolist())) == known.sum()
        has_teacher = (weights > 0) & (labels < 9_000)
        if example.complete:
            has_teacher[len(example.targets)] = False  # the closing <eos>
            assert len(read) == len(example.inputs) + len(example.targets) - 2 * spans(example) - mode(example)
        np.testing.assert_array_equal(known, has_teacher)


def spans(example):
    return int(np.isin(example.targets, SENTINELS).sum())


def mode(example):
    return int(9_000 <= example.inputs[0] <= 9_003)


def test_text_with_sentinels_of_its_own_has_no_teacher():
    objective = SpanCorruption(Denoiser(2, 0.3), 16, 16, sentinels=[7, 8, 9])
    text = np.arange(51, 61)
    text[1] = 8
    y, _ = view(objective(text, np.random.default_rng(0)), objective, 16, 16)
    assert (y["teacher_positions"] == -1).all()


def test_label_without_weight_has_no_teacher():
    x, labels, weights = model_arrays(PrefixLM(4, 4)(np.arange(51, 59), None), 4, 4)
    weights[1] = 0
    batch = {name: array[None] for name, array in x.items()}, labels[None], weights[None]
    _, y, _ = TeacherView(None, GEMMA_SPECIAL_IDS)(batch)
    assert y["teacher_positions"].tolist() == [[4, -1, 6, 7]]


@pytest.mark.parametrize("documents", ["joined", "whole"])
def test_dataset_keeps_its_kind_and_its_batches(documents):
    objective = PrefixLM(8, 8)
    texts = [list(range(60, 60 + length)) for length in (16, 30, 25)]
    data = pretraining_dataset(texts, None, objective, batch_size=2, num_epochs=1, documents=documents)
    viewed = distillation_dataset(data, objective)
    assert isinstance(viewed, grain.MapDataset) == (documents == "joined")
    for (x, labels, weights), (same_x, y, same_weights) in zip(data, viewed, strict=True):
        np.testing.assert_array_equal(y["labels"], labels)
        np.testing.assert_array_equal(same_weights, weights)
        np.testing.assert_array_equal(same_x["encoder_token_ids"], x["encoder_token_ids"])
        assert {name: (array.shape, str(array.dtype)) for name, array in y.items()} == {
            "labels": ((2, 8), "int32"),
            "teacher_token_ids": ((2, 16), "int32"),
            "teacher_padding_mask": ((2, 16), "int32"),
            "teacher_positions": ((2, 8), "int32"),
        }


def test_packed_rows_are_refused():
    texts = [[60, 61, 62], [70, 71, 72, 73], [80, 81]]
    data = pretraining_dataset(texts, None, PrefixLM(8, 8), batch_size=1, num_epochs=1, documents="whole", pack=True)
    with pytest.raises(ValueError, match="`data` is packed"):
        next(iter(distillation_dataset(data)))


def test_what_is_no_dataset_of_token_ids_is_refused():
    with pytest.raises(ValueError, match=r"`data` must be a Grain dataset.*list"):
        distillation_dataset([1, 2])
    rows = grain.MapDataset.range(2)
    for element, message in (
        (3, "Received: int"),
        (({"encoder_text": "a"}, [1], [1]), "x without encoder_token_ids"),
        (({}, np.ones((1, 1))), r"Received: \(dict, ndarray\)"),
    ):
        with pytest.raises(ValueError, match=message):
            distillation_dataset(rows.map(lambda _, element=element: element))[0]
    data = pretraining_dataset([list(range(60, 90))], None, PrefixLM(4, 4), batch_size=1)
    with pytest.raises(ValueError, match="have more already"):
        distillation_dataset(distillation_dataset(data))[0]
