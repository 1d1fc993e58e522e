import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_t5gemma.data.objectives.prefix_lm import PrefixLM

RNG = np.random.default_rng(0)


def test_prefix_lm_on_the_docstrings_example_gives_two_halves():
    example = PrefixLM(encoder_length=4, decoder_length=4)(np.arange(51, 59), RNG)
    assert example.inputs.tolist() == [51, 52, 53, 54]
    assert example.targets.tolist() == [55, 56, 57, 58]
    assert example.inputs.dtype == example.targets.dtype == np.int32


def test_prefix_lm_targets_are_left_open_because_the_window_ended_and_not_the_text():
    assert not PrefixLM(4, 4)(np.arange(8), RNG).complete


@given(encoder=st.integers(1, 300), decoder=st.integers(1, 300), data=st.data())
def test_prefix_lm_of_any_sequence_splits_it_into_two_parts_that_fit_and_are_not_empty(encoder, decoder, data):
    # A slip elsewhere: empty inputs, where the split falls on an end.
    length = data.draw(st.integers(2, max(2, encoder + decoder)))
    ids = np.arange(length)
    example = PrefixLM(encoder, decoder)(ids, RNG)
    assert np.append(example.inputs, example.targets).tolist() == ids.tolist()
    assert 1 <= len(example.inputs) <= encoder
    assert 1 <= len(example.targets) <= decoder


@pytest.mark.parametrize(("length", "halves"), [(2, (1, 1)), (3, (1, 2)), (7, (3, 4)), (8, (4, 4))])
def test_prefix_lm_of_a_short_sequence_still_gives_halves(length, halves):
    example = PrefixLM(4, 4)(np.arange(length), RNG)
    assert (len(example.inputs), len(example.targets)) == halves


@pytest.mark.parametrize("length", [0, 1])
def test_prefix_lm_of_fewer_than_two_tokens_is_refused(length):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        PrefixLM(4, 4)(np.arange(length), RNG)


def test_prefix_lm_of_more_than_both_lengths_is_refused():
    with pytest.raises(ValueError, match="at most raw_length=8"):
        PrefixLM(4, 4)(np.arange(9), RNG)


@pytest.mark.parametrize(("lengths", "name"), [((0, 4), "encoder_length"), ((4, 2.5), "decoder_length")])
def test_prefix_lm_with_a_length_out_of_range_names_it(lengths, name):
    with pytest.raises(ValueError, match=name):
        PrefixLM(*lengths)
