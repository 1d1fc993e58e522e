import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_t5gemma.data.objectives.span_corruption import Denoiser
from keras_t5gemma.data.objectives.ul2 import UL2

MODES = {"R": 501, "S": 502, "X": 503}
WIDE = range(10_000, 10_700)


def test_ul2_on_the_docstrings_example_gives_its_arrays():
    objective = UL2(8, 8, mixture=[(Denoiser(None, 0.25), 1)], mode_tokens={"S": 500})
    example = objective(np.arange(51, 59), np.random.default_rng(0))
    assert example.inputs.tolist() == [500, 51, 52, 53, 54, 55, 56, 7]
    assert example.targets.tolist() == [7, 57, 58]
    assert example.complete


def test_ul2_has_the_papers_seven_denoisers_in_equal_parts():
    recipe = [(part.denoiser.mean_span, part.denoiser.rate, weight) for part, weight in UL2(64, 64).parts]
    assert recipe == [
        (3, 0.15, 1),
        (8, 0.15, 1),
        (3, 0.5, 1),
        (8, 0.5, 1),
        (64, 0.15, 1),
        (64, 0.5, 1),
        (None, 0.25, 1),
    ]


def test_t5gemma2_has_five_denoisers_of_which_the_long_suffix_weighs_four():
    parts = UL2(64, 64, mixture="t5gemma2").parts
    recipe = [(part.denoiser.mean_span, part.denoiser.rate, weight) for part, weight in parts]
    assert recipe == [(3, 0.15, 1), (12, 0.5, 1), (32, 0.15, 1), (32, 0.5, 1), (None, 0.75, 4)]


@pytest.mark.parametrize(("mixture", "shares"), [("ul2", (2 / 7, 1 / 7, 4 / 7)), ("t5gemma2", (1 / 8, 1 / 2, 3 / 8))])
def test_ul2_over_many_draws_uses_denoisers_by_weight(mixture, shares):
    objective = UL2(64, 64, mixture=mixture, mode_tokens=MODES)
    rng = np.random.default_rng(0)
    first = [objective(np.arange(200, 260), rng).inputs[0] for _ in range(3000)]
    assert [first.count(MODES[mode]) / 3000 for mode in "RSX"] == pytest.approx(shares, abs=0.03)


@given(
    encoder=st.integers(3, 700),
    decoder=st.integers(3, 700),
    mixture=st.sampled_from(["ul2", "t5gemma2"]),
    modes=st.sampled_from([None, MODES]),
    seed=st.integers(0, 2**32),
)
def test_ul2_at_each_denoisers_raw_length_fits_both_sides(encoder, decoder, mixture, modes, seed):
    for part, _ in UL2(encoder, decoder, mixture=mixture, mode_tokens=modes, sentinels=WIDE).parts:
        example = part(np.full(part.raw_length, 5), np.random.default_rng(seed))
        assert len(example.inputs) <= encoder
        assert len(example.targets) + 1 <= decoder


@pytest.mark.parametrize("mixture", ["ul2", "t5gemma2"])
def test_ul2_at_each_denoisers_raw_length_fills_the_encoder_or_the_decoder(mixture):
    for part, _ in UL2(512, 512, mixture=mixture, sentinels=WIDE).parts:
        example = part(np.full(part.raw_length, 5), np.random.default_rng(0))
        assert max(len(example.inputs), len(example.targets) + 1) >= 511


def test_ul2_with_more_ids_than_every_denoiser_takes_is_refused():
    objective = UL2(64, 64)
    with pytest.raises(ValueError, match=f"at most raw_length={objective.raw_length} ids"):
        objective(np.full(objective.raw_length + 1, 5), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixture": "ul3"}, "must be one of ul2, t5gemma2"),
        ({"mixture": []}, "empty"),
        ({"mixture": [(Denoiser(3, 0.15), 0.5)]}, "whole numbers"),
        ({"mode_tokens": {"R": 501}}, 'an id for "X"'),
        ({"mode_tokens": MODES | {"Q": 504}}, "Q"),
        ({"mode_tokens": MODES | {"S": 7}}, "`mode_token` must not be a sentinel"),
    ],
)
def test_ul2_with_a_value_out_of_range_names_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        UL2(64, 64, **arguments)
