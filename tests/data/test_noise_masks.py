"""Protected ids, and what happens where sentinels run out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_t5gemma.data.objectives.noise_masks import corrupt, mask_around, span_bounds
from keras_t5gemma.data.objectives.span_corruption import GEMMA_CONTROL_IDS, GEMMA_SENTINELS, Denoiser, SpanCorruption
from keras_t5gemma.data.objectives.ul2 import UL2

EOS = 1


def bits(text):
    return np.array([letter == "x" for letter in text])


def test_corrupt_on_the_docstrings_example_gives_its_arrays():
    inputs, targets = corrupt(np.array([51, 52, 53, 54]), bits(".xx."), np.array([7, 8]))
    assert (inputs.tolist(), targets.tolist()) == ([51, 7, 54], [7, 52, 53])


def test_corrupt_of_a_sequence_that_starts_corrupted_starts_with_a_sentinel():
    inputs, targets = corrupt(np.array([51, 52, 53, 54]), bits("x.xx"), np.array([7, 8]))
    assert (inputs.tolist(), targets.tolist()) == ([7, 52, 8], [7, 51, 8, 53, 54])


def test_mask_around_repairs_a_span_on_both_sides_of_a_protected_token_as_drawn():
    protected = np.array([False, False, False, False, True, False, False, False, False, False, False])
    for seed in range(200):
        mask = mask_around(protected, 6, 2, 9, np.random.default_rng(seed))
        starts, ends = span_bounds(mask)
        assert (mask.sum(), len(starts)) == (6, 2)
        assert not mask[4]
        assert not any(start < 4 < end for start, end in zip(starts, ends, strict=True))


@given(
    data=st.data(),
    length=st.integers(2, 300),
    share=st.sampled_from([0.02, 0.1, 0.3, 0.6, 0.95]),
    mean_span=st.floats(1, 64),
    rate=st.floats(0.05, 0.9),
    seed=st.integers(0, 2**32),
)
def test_mask_around_any_tokens_never_corrupts_a_protected_one_nor_more_than_asked(
    data, length, share, mean_span, rate, seed
):
    rng = np.random.default_rng(seed)
    protected = rng.random(length) < share
    protected[data.draw(st.integers(0, length - 1))] = False
    noise, spans = Denoiser(mean_span, rate).counts(length)
    mask = mask_around(protected, noise, spans, spans + 5, rng)
    assert not (mask & protected).any()
    assert 1 <= mask.sum() <= noise
    assert len(span_bounds(mask)[0]) <= spans + 5


@pytest.mark.parametrize("denoiser", [Denoiser(3, 0.15), Denoiser(3, 0.5), Denoiser(12, 0.5), Denoiser(32, 0.15)])
def test_span_corruption_of_joined_documents_keeps_eos_and_the_recipes_counts(denoiser):
    # Documents of about 60 tokens: a window holds several <eos>, and some spans would lie across one.
    objective = SpanCorruption(denoiser, 512, 512, sentinels=range(300, 900))
    rng = np.random.default_rng(0)
    for _ in range(100):
        ids = rng.integers(1000, 2000, objective.raw_length)
        ids[rng.integers(0, len(ids), len(ids) // 60)] = EOS
        example = objective(ids, rng)
        assert (len(example.inputs), len(example.targets)) == denoiser.lengths(len(ids))
        assert EOS not in example.targets
        assert (example.inputs == EOS).sum() == (ids == EOS).sum()


def test_span_corruption_where_protected_ids_lie_too_close_leaves_the_last_ids_out_and_fits():
    # Every third token is <eos>: spans of 64 tokens cannot lie between them, nor can as few be half of the text.
    objective = SpanCorruption(Denoiser(64, 0.5), 128, 128)
    ids = np.arange(1000, 1000 + objective.raw_length)
    ids[::3] = EOS
    example = objective(ids, np.random.default_rng(0))
    assert len(example.inputs) <= 128
    assert len(example.targets) + 1 <= 128
    seen = [*example.inputs[example.inputs >= 1000], *example.targets[example.targets >= 1000]]
    kept = len(seen) + (example.inputs == EOS).sum()
    assert len(ids) // 2 < kept < len(ids)
    assert sorted(seen) == ids[:kept][ids[:kept] >= 1000].tolist()


def test_suffix_of_a_denoiser_without_mean_span_takes_eos_along_as_a_continuation_does():
    objective = SpanCorruption(Denoiser(None, 0.5), 8, 8)
    example = objective(np.array([51, 52, 53, 1, 54, 55]), np.random.default_rng(0))
    assert example.targets.tolist() == [7, 1, 54, 55]


def test_protected_ids_are_configurable_and_sentinels_and_mode_tokens_are_always_among_them():
    rng = np.random.default_rng(0)
    objective = SpanCorruption(Denoiser(2, 0.5), 64, 64, sentinels=[7, 8, 9, *range(20, 40)], protected=[500])
    ids = np.tile([500, 600, 601, 602, 7], 10)
    targets = np.concatenate([objective(ids, rng).targets for _ in range(50)])
    assert 500 not in targets
    modes = UL2(64, 64, mixture=[(Denoiser(3, 0.5), 1)], mode_tokens={"R": 501, "S": 502, "X": 503})
    ids = np.tile([501, 600, 502, 601, 503, 602], 8)
    targets = np.concatenate([modes(ids, rng).targets for _ in range(50)])
    assert not {501, 502, 503} & set(targets.tolist())
    free = SpanCorruption(Denoiser(2, 0.5), 64, 64, protected=())
    targets = np.concatenate([free(np.tile([1, 600], 20), rng).targets for _ in range(50)])
    assert 1 in targets


def test_protected_ids_are_gemmas_control_ids_by_default():
    assert GEMMA_CONTROL_IDS == (0, 1, 2, 106, 107)
    assert SpanCorruption(Denoiser(3, 0.15), 8, 8).protected == GEMMA_CONTROL_IDS


def test_span_corruption_of_protected_ids_alone_is_refused():
    with pytest.raises(ValueError, match="All 3 ids are protected"):
        SpanCorruption(Denoiser(3, 0.15), 8, 8)(np.array([1, 1, 1]), np.random.default_rng(0))


@pytest.mark.filterwarnings("error")
def test_too_few_sentinels_merged_keep_the_length_with_fewer_longer_spans_and_no_warning():
    objective = SpanCorruption(Denoiser(3, 0.5), 8192, 8192, too_few_sentinels="merge")
    example = objective(np.arange(1000, 1000 + objective.raw_length), np.random.default_rng(0))
    sentinels = [i for i in example.inputs if i < 1000]
    assert sentinels == list(GEMMA_SENTINELS)
    assert max(len(example.inputs), len(example.targets) + 1) >= 8191
    assert objective.raw_length > 15_000


def test_too_few_sentinels_is_an_option_of_ul2_for_all_its_denoisers():
    parts = UL2(2048, 2048, too_few_sentinels="merge").parts
    assert {part.too_few_sentinels for part, _ in parts} == {"merge"}
    with pytest.raises(ValueError, match="must be one of cap, merge"):
        UL2(64, 64, too_few_sentinels="reuse")
