import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_t5gemma.data.objectives.span_corruption import GEMMA_SENTINELS, Denoiser, SpanCorruption

SENTINELS = range(10_000, 10_700)
denoisers = st.builds(
    Denoiser, mean_span=st.one_of(st.none(), st.floats(1, 80)), rate=st.floats(0.01, 0.99, exclude_max=True)
)
seeds = st.integers(0, 2**32)


def rebuild(example, sentinels):
    """The source, from inputs and targets; fails where a sentinel is missing, reused or out of order."""
    spans = []
    for token in example.targets:
        if token in sentinels:
            spans.append([])
        else:
            spans[-1].append(token)
    source, holes = [], 0
    for token in example.inputs:
        if token in sentinels:
            assert token == sentinels[holes]
            source += spans[holes]
            holes += 1
        else:
            source.append(token)
    assert [token for token in example.targets if token in sentinels] == list(sentinels[:holes])
    assert all(spans)
    return source


def test_span_corruption_on_the_docstrings_example_gives_its_arrays():
    objective = SpanCorruption(Denoiser(2, 0.5), encoder_length=8, decoder_length=8, sentinels=[7, 8, 9])
    example = objective(np.arange(51, 59), np.random.default_rng(0))
    assert example.inputs.tolist() == [51, 52, 53, 7, 56, 8]
    assert example.targets.tolist() == [7, 54, 55, 8, 57, 58]
    assert example.inputs.dtype == example.targets.dtype == np.int32
    assert example.complete


@given(denoiser=denoisers, length=st.integers(2, 600), seed=seeds)
def test_span_corruption_of_any_sequence_keeps_every_token_once_and_in_order(denoiser, length, seed):
    objective = SpanCorruption(denoiser, encoder_length=1200, decoder_length=1200, sentinels=SENTINELS)
    ids = np.random.default_rng(seed).integers(200, 300, length)
    example = objective(ids, np.random.default_rng(seed))
    assert rebuild(example, SENTINELS) == ids.tolist()
    assert (len(example.inputs), len(example.targets)) == denoiser.lengths(length)


@given(denoiser=denoisers, length=st.integers(2, 600), seed=seeds)
def test_noise_mask_of_any_sequence_has_the_promised_tokens_and_spans(denoiser, length, seed):
    mask = denoiser.noise_mask(length, np.random.default_rng(seed))
    noise, spans = denoiser.counts(length)
    starts = np.sum(mask & ~np.append(False, mask[:-1]))
    assert (mask.sum(), starts) == (noise, spans)
    assert not mask[0]
    assert mask[-1]


@pytest.mark.parametrize(("mean_span", "rate"), [(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)])
def test_noise_mask_over_many_draws_has_the_recipes_rate_and_mean_span(mean_span, rate):
    denoiser = Denoiser(mean_span, rate)
    rng = np.random.default_rng(0)
    masks = [denoiser.noise_mask(length, rng) for length in rng.integers(900, 1100, 300)]
    noise = sum(mask.sum() for mask in masks)
    spans = sum(np.sum(np.diff(mask.astype(int)) == 1) for mask in masks)
    assert noise / sum(map(len, masks)) == pytest.approx(rate, rel=0.01)
    assert noise / spans == pytest.approx(mean_span, rel=0.1)


def test_noise_mask_over_many_draws_cuts_spans_evenly_at_random():
    # 4 corrupted tokens in 2 spans: lengths 1 + 3, 2 + 2 and 3 + 1 are equally likely.
    rng = np.random.default_rng(0)
    masks = [Denoiser(2, 0.5).noise_mask(8, rng) for _ in range(3000)]
    last_spans = [int(np.argmin(mask[::-1])) for mask in masks]
    assert [last_spans.count(n) / 3000 for n in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.03)


@given(length=st.integers(2, 400), rate=st.sampled_from([0.25, 0.75]), seed=seeds)
def test_noise_mask_without_a_mean_span_is_the_suffix_whatever_the_seed(length, rate, seed):
    # A slip elsewhere: this split drawn uniformly at random.
    mask = Denoiser(None, rate).noise_mask(length, np.random.default_rng(seed))
    suffix = min(max(round(length * rate), 1), length - 1)
    assert mask.tolist() == [False] * (length - suffix) + [True] * suffix


@pytest.mark.parametrize(
    ("length", "denoiser", "counts"),
    [
        (2, Denoiser(3, 0.15), (1, 1)),
        (3, Denoiser(3, 0.15), (1, 1)),
        (2, Denoiser(1, 0.9), (1, 1)),
        (3, Denoiser(1, 0.9), (2, 1)),
        # A slip elsewhere: 9 spans of one token, with a single uncorrupted token to keep them apart.
        (10, Denoiser(1, 0.9), (9, 1)),
        (10, Denoiser(1, 0.6), (6, 4)),
    ],
)
def test_counts_of_short_sequences_and_high_rates_leave_a_token_on_either_side_of_a_span(length, denoiser, counts):
    assert denoiser.counts(length) == counts


@pytest.mark.parametrize("ids", [[], [5]])
def test_span_corruption_of_fewer_than_two_tokens_is_refused(ids):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        SpanCorruption(Denoiser(3, 0.15), 8, 8)(np.array(ids, int), np.random.default_rng(0))


@pytest.mark.parametrize("ids", [[[1, 2]], [1.0, 2.0]])
def test_span_corruption_of_something_else_than_ids_is_refused(ids):
    with pytest.raises(ValueError, match="1-D integers"):
        SpanCorruption(Denoiser(3, 0.15), 8, 8)(ids, np.random.default_rng(0))


def t5x_lengths(inputs_length, noise_density, mean_span):
    """(raw tokens, targets) by the arithmetic of seqio's `random_spans_helper`, an <eos> counted on both sides."""

    def lengths(tokens):
        noise = round(tokens * noise_density)
        spans = round(noise / mean_span)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length - 1
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    inputs, targets = lengths(tokens)
    if noise_density == 0.5 and targets > inputs:
        return tokens - 1, targets - 1
    return tokens, targets


T5X_LENGTHS = [
    (3, 0.15, 568, 114),
    (3, 0.5, 766, 512),
    (64, 0.15, 600, 92),
    (12, 0.5, 944, 512),
    (32, 0.15, 598, 94),
    (32, 0.5, 990, 512),
]


@pytest.mark.parametrize(("mean_span", "rate", "raw", "targets"), T5X_LENGTHS)
def test_raw_length_for_512_inputs_is_t5s(mean_span, rate, raw, targets):
    denoiser = Denoiser(mean_span, rate)
    assert t5x_lengths(512, rate, mean_span) == (raw, targets)
    assert denoiser.raw_length(512 - 1, 512 - 1) == raw
    # What T5X reports for (32, 0.5) is a bound: it takes one token off 991 and one target off 513, but 990 tokens have
    # 15 spans where 991 have 16, so that the sentinel goes too, and the targets with their <eos> are 511.
    made = 511 if (mean_span, rate) == (32, 0.5) else targets
    assert denoiser.lengths(raw)[1] + 1 == made
    mask = denoiser.noise_mask(raw, np.random.default_rng(0))
    assert mask.sum() + np.sum(np.diff(mask.astype(int)) == 1) + 1 == made


@pytest.mark.parametrize(
    ("mean_span", "rate", "runs_out"),
    [(3, 0.5, 598), (8, 0.5, 1591), (3, 0.15, 1991), (12, 0.5, 2387), (32, 0.5, 6367)],
)
def test_raw_length_with_gemmas_sentinels_stops_before_they_run_out(mean_span, rate, runs_out):
    denoiser = Denoiser(mean_span, rate)
    assert denoiser.raw_length(8192, 8192, max_spans=len(GEMMA_SENTINELS)) == runs_out - 1
    assert denoiser.counts(runs_out - 1)[1] == 99
    assert denoiser.counts(runs_out)[1] == 100


@given(denoiser=denoisers, encoder=st.integers(2, 300), decoder=st.integers(3, 300), seed=seeds)
def test_raw_length_of_ids_fits_and_one_more_would_not(denoiser, encoder, decoder, seed):
    objective = SpanCorruption(denoiser, encoder, decoder, sentinels=SENTINELS)
    ids = np.full(objective.raw_length, 5)
    example = objective(ids, np.random.default_rng(seed))
    assert len(example.inputs) <= encoder
    assert len(example.targets) + 1 <= decoder
    longer = denoiser.lengths(objective.raw_length + 1)
    assert longer[0] > encoder or longer[1] + 1 > decoder
    with pytest.raises(ValueError, match="at most raw_length"):
        objective(np.append(ids, 5), np.random.default_rng(seed))


def test_span_corruption_short_of_sentinels_warns_and_never_reuses_one():
    with pytest.warns(UserWarning, match="only 99 sentinels"):
        objective = SpanCorruption(Denoiser(3, 0.5), 8192, 8192)
    example = objective(np.arange(1000, 1000 + objective.raw_length), np.random.default_rng(0))
    assert [i for i in example.inputs if i < 1000] == list(GEMMA_SENTINELS)


@given(encoder=st.integers(3, 200), decoder=st.integers(3, 200), denoiser=denoisers, seed=seeds)
def test_mode_token_stands_first_within_the_encoders_length_and_costs_no_sentinel(encoder, decoder, denoiser, seed):
    # A slip elsewhere: the token put in front after the lengths are fixed, and the last sentinel trimmed off.
    objective = SpanCorruption(denoiser, encoder, decoder, sentinels=SENTINELS, mode_token=99)
    ids = np.full(objective.raw_length, 5)
    example = objective(ids, np.random.default_rng(seed))
    assert len(example.inputs) <= encoder
    assert example.inputs[0] == 99
    assert example.inputs[-1] == SENTINELS[denoiser.counts(len(ids))[1] - 1]


def test_span_corruption_with_the_same_seed_gives_the_same_example_and_with_another_another():
    objective = SpanCorruption(Denoiser(3, 0.5), 128, 128)
    first, again, other = (objective(np.arange(200, 320), np.random.default_rng(seed)).inputs for seed in (3, 3, 4))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("denoiser", "mode"),
    [
        (Denoiser(3, 0.15), "R"),
        (Denoiser(8, 0.15), "R"),
        (Denoiser(3, 0.5), "X"),
        (Denoiser(64, 0.15), "X"),
        (Denoiser(None, 0.25), "S"),
    ],
)
def test_mode_of_a_denoiser_is_ul2s(denoiser, mode):
    assert denoiser.mode == mode


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Denoiser(3, 1.0), "`rate`"),
        (lambda: Denoiser(0.5, 0.15), "`mean_span`"),
        (lambda: SpanCorruption(Denoiser(3, 0.15), 1, 8), "`encoder_length`"),
        (lambda: SpanCorruption(Denoiser(3, 0.15), 2, 8, mode_token=5), "`encoder_length`"),
        (lambda: SpanCorruption(Denoiser(3, 0.15), 8, 2), "`decoder_length`"),
        (lambda: SpanCorruption(Denoiser(3, 0.15), 8, 8, sentinels=[]), "`sentinels`"),
        (lambda: SpanCorruption(Denoiser(3, 0.15), 8, 8, sentinels=[7, 8, 7]), "distinct"),
        (lambda: SpanCorruption(Denoiser(3, 0.15), 8, 8, mode_token=7), "`mode_token`"),
    ],
)
def test_span_corruption_with_a_value_out_of_range_names_it(make, message):
    with pytest.raises(ValueError, match=message):
        make()
