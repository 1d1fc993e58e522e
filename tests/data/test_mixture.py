import numpy as np
import pytest

import keras_t5gemma as kt
from keras_t5gemma.data.objectives.by_name import RECIPES, objective
from keras_t5gemma.data.objectives.mixture import Mixture
from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.objectives.span_corruption import Denoiser, SpanCorruption
from keras_t5gemma.data.objectives.ul2 import UL2


def test_mixture_on_the_docstrings_example_flattens_parts_in_whole_numbers():
    mixture = Mixture([(PrefixLM(512, 512), 1), (UL2(512, 512), 3)])
    assert [weight for _, weight in mixture.parts] == [7, *[3] * 7]
    assert mixture.parts[0][0] == PrefixLM(512, 512)
    assert [part for part, _ in mixture.parts[1:]] == [part for part, _ in UL2(512, 512).parts]


@pytest.mark.parametrize(("weights", "parts"), [((2, 4), [1, 2]), ((1, 1), [1, 1]), ((10, 15), [2, 3])])
def test_mixture_weights_come_down_to_the_smallest_whole_numbers(weights, parts):
    mixture = Mixture([(PrefixLM(8, 8), weights[0]), (PrefixLM(4, 4), weights[1])])
    assert [weight for _, weight in mixture.parts] == parts


def test_mixture_of_mixtures_keeps_shares():
    inner = Mixture([(PrefixLM(8, 8), 1), (PrefixLM(8, 4), 1)])
    outer = Mixture([(inner, 1), (PrefixLM(4, 4), 1)])
    assert outer.parts == ((PrefixLM(8, 8), 1), (PrefixLM(8, 4), 1), (PrefixLM(4, 4), 2))


def test_mixture_has_the_longest_lengths_and_takes_what_its_shortest_part_takes():
    mixture = Mixture([(PrefixLM(8, 4), 1), (PrefixLM(6, 9), 1)])
    assert (mixture.encoder_length, mixture.decoder_length, mixture.raw_length) == (8, 9, 12)
    with pytest.raises(ValueError, match="at most raw_length=12"):
        mixture(np.arange(13), np.random.default_rng(0))


def test_mixture_over_many_draws_uses_parts_by_weight():
    mixture = Mixture([(PrefixLM(4, 4, mode_token=500), 1), (PrefixLM(4, 4, mode_token=501), 3)])
    rng = np.random.default_rng(0)
    first = [mixture(np.arange(10, 14), rng).inputs[0] for _ in range(3000)]
    assert first.count(501) / 3000 == pytest.approx(0.75, abs=0.03)


def test_prefix_lm_with_a_mode_token_has_it_first_within_the_encoders_length():
    part = PrefixLM(4, 4, mode_token=500)
    assert part.raw_length == 7
    example = part(np.arange(51, 58), np.random.default_rng(0))
    assert example.inputs.tolist() == [500, 51, 52, 53]
    assert example.targets.tolist() == [54, 55, 56, 57]


def test_objective_by_name_is_the_value():
    assert set(RECIPES) == {"prefixlm", "span_corruption", "ul2", "t5gemma2"}
    assert objective("prefixlm", 8, 4) == PrefixLM(8, 4)
    assert objective("span_corruption", 64, 64) == SpanCorruption(Denoiser(3, 0.15), 64, 64)
    assert objective("ul2", 64, 32) == UL2(64, 32)
    assert kt.objective("t5gemma2", 64, 64, sentinels=range(900, 999)) == UL2(
        64, 64, mixture="t5gemma2", sentinels=range(900, 999)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objective("ul3", 8, 8), "must be one of prefixlm, span_corruption, t5gemma2, ul2. Received: 'ul3'"),
        (lambda: Mixture([]), "empty"),
        (lambda: Mixture([(PrefixLM(8, 8), 0.5)]), "whole numbers"),
        (lambda: Mixture([(PrefixLM(8, 8), True)]), "whole numbers"),
        (lambda: Mixture([PrefixLM(8, 8)]), "must be pairs of an objective and its weight"),
        (lambda: Mixture([("ul2", 1)]), "must be pairs of an objective and a weight"),
        (lambda: PrefixLM(1, 4, mode_token=5), "`encoder_length`"),
        (lambda: PrefixLM(4, 4, mode_token=-1), "`mode_token`"),
    ],
)
def test_mixture_and_names_with_a_value_out_of_range_name_it(make, message):
    with pytest.raises(ValueError, match=message):
        make()
