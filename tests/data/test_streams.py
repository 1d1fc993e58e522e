"""Documents of a stream, joined and whole, to examples."""

import itertools

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_t5gemma.data.objectives.by_name import objective
from keras_t5gemma.data.objectives.mixture import Mixture
from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.objectives.span_corruption import Denoiser, SpanCorruption
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset
from keras_t5gemma.data.pipelines.streams import Pieces, generator

EOS = 1


def stream(documents):
    """A `grain.IterDataset`: one that has no random access and no length."""
    return grain.MapDataset.source(documents).to_iter_dataset()


def examples(data):
    """`(inputs, labels)` of each row."""
    for x, y, _ in data:
        for row in range(len(y)):
            yield (
                x["encoder_token_ids"][row][x["encoder_padding_mask"][row] > 0].tolist(),
                y[row][x["decoder_padding_mask"][row] > 0].tolist(),
            )


def windows(texts, recipe, **options):
    options = {"batch_size": 1, "shuffle": False, "num_epochs": 1} | options
    return list(examples(pretraining_dataset(stream(texts), None, recipe, **options)))


def test_joined_stream_has_eos_after_each_document_and_ends_with_what_is_left():
    found = windows([[51, 52], [], [53, 54, 55, 1], [56]], PrefixLM(2, 3))
    assert found == [([51, 52], [1, 53, 54]), ([55], [1, 56, 1])]


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any),
    recipe=st.sampled_from([PrefixLM(8, 8), PrefixLM(20, 3), Mixture([(PrefixLM(8, 8), 1), (PrefixLM(5, 9), 2)])]),
)
def test_joined_stream_of_any_documents_has_every_id_once_and_in_order(lengths, recipe):
    ids = itertools.count(200)
    documents = [[next(ids) for _ in range(length)] for length in lengths]
    found = [token for row in windows(documents, recipe) for part in row for token in part]
    whole = [token for document in documents if document for token in [*document, EOS]]
    # A single id at the very end makes no example.
    assert found == whole[: len(found)]
    assert len(whole) - len(found) <= 1


def test_joined_stream_deals_a_mixture_in_its_exact_proportions():
    recipe = Mixture([(PrefixLM(8, 8, mode_token=500), 1), (PrefixLM(8, 8, mode_token=501), 3)])
    first = [inputs[0] for inputs, _ in windows([list(range(600, 1800))], recipe)]
    deals = [sorted(first[i : i + 4]) for i in range(0, len(first) - 4, 4)]
    assert len(deals) > 10
    assert all(deal == [500, 501, 501, 501] for deal in deals)


@pytest.mark.parametrize("length", [1, 2, 3, 16])
def test_a_whole_document_is_one_example_that_ends_in_eos(length):
    document = list(range(200, 200 + length))
    ((inputs, labels),) = windows([document], PrefixLM(12, 12), documents="whole")
    assert inputs + labels == [*document, EOS]
    if length > 1:
        ((inputs, labels),) = windows([document], SpanCorruption(Denoiser(3, 0.5), 16, 16), documents="whole")
        # The encoder is given no <eos>, as in `generate`; the targets are closed by one.
        assert EOS not in inputs
        assert labels[-1] == EOS
        assert sorted(token for token in inputs + labels if token >= 200) == document


def test_a_whole_document_of_one_token_has_nothing_to_corrupt_and_makes_no_example():
    assert windows([[200], [], [201, 202]], SpanCorruption(Denoiser(3, 0.5), 16, 16), documents="whole") == [
        ([201, 7], [7, 202, EOS])
    ]


@given(
    length=st.integers(1, 400),
    name=st.sampled_from(["prefixlm", "span_corruption", "ul2", "t5gemma2"]),
    lengths=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    seed=st.integers(0, 2**32),
)
def test_a_document_of_any_length_is_cut_into_pieces_that_have_every_id_once(length, name, lengths, seed):
    recipe = objective(name, *lengths)
    document = np.arange(200, 200 + length)
    made = Pieces(recipe, EOS, seed).flat_map((0, document))
    seen = sorted(i for example in made for i in [*example.inputs, *example.targets] if i >= 200)
    if length > 1 or name == "prefixlm":
        assert seen == document.tolist()
    else:
        assert not made
    for example in made:
        assert len(example.inputs) <= lengths[0]
        assert len(example.targets) + example.complete <= lengths[1]
    closed = [example.complete or example.targets[-1] == EOS for example in made]
    # Of text that goes on in the next piece, a continuation is not closed.
    assert not made or closed[-1]
    assert name != "prefixlm" or sum(closed) == 1


def test_generators_of_a_key_are_the_same_and_of_others_differ():
    draws = {key: generator(*key).integers(2**62) for key in itertools.product(range(3), range(3), range(3))}
    assert len(set(draws.values())) == 27
    assert all(generator(*key).integers(2**62) == draw for key, draw in draws.items())


def test_an_example_of_a_stream_depends_on_seed_and_number_alone():
    documents = [list(range(200, 200 + n)) for n in range(5, 60)]
    recipe = objective("t5gemma2", 32, 32)
    for whole in ("joined", "whole"):
        first, again, other = (windows(documents, recipe, documents=whole, seed=seed) for seed in (3, 3, 4))
        assert first == again
        assert first != other
        two = windows(documents, recipe, documents=whole, seed=3, num_epochs=2)
        assert two[: len(first) - 1] == first[:-1]
        assert two[len(first) :] != first[: len(two) - len(first)]
