"""Control of generation: options against `transformers`, samples, limits, seeds, log-probabilities and scores."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers.peers import hf_logits, loud_inputs, tiny_config
from helpers.tiny import twins
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.inference.decoding.loop import Control
from keras_t5gemma.inference.generate import generate_program
from keras_t5gemma.inference.programs.compiled import Programs
from keras_t5gemma.kernels.cross_entropy.chunks import CHUNK_BYTES

LENGTH = 16
CONFIG = tiny_config(balanced=False, num_layers=1)  # compiling is what these tests cost
STOPS = tuple(range(1, 128, 9))  # so many that rows stop early again and again
OPTIONS = (kt.RepetitionPenalty(1.4), kt.NoRepeatNgrams(2), kt.MinimumLength(5), kt.ForbiddenTokens([9, 30, 77]))


@pytest.fixture(scope="module")
def pair():
    peer, backbone = twins(CONFIG)
    return peer, kt.T5GemmaSeq2SeqLM(backbone)


@pytest.fixture
def lm(pair):
    pair[1].compile(sampler=kt.TopKTopPSampler(k=40, p=0.95, temperature=1.3, seed=0))
    return pair[1]


@pytest.fixture(scope="module")
def greedy(pair):
    """A model of its own, on the same weights: never compiled anew, so that tests share its programs."""
    return kt.T5GemmaSeq2SeqLM(pair[1].backbone)


def prompts(rows=4):
    inputs = loud_inputs(CONFIG, batch=4, encoder_length=11)
    return {name: values[:rows] for name, values in inputs.items() if name.startswith("encoder")}


def peer_generate(peer, stops=STOPS, length=LENGTH, **options):
    import torch

    inputs = prompts()
    ids, mask = (torch.from_numpy(inputs[f"encoder_{name}"]).long() for name in ("token_ids", "padding_mask"))
    output = peer.generate(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=torch.full((len(ids), 1), 2),
        max_length=length,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=0,
        **options,
    ).numpy()
    output = np.pad(output, ((0, 0), (0, LENGTH - output.shape[1])))
    # Its beam search fills up with the first stop id where padding is 0.
    stopped = np.isin(output, stops)
    return np.where(np.cumsum(stopped, axis=1) - stopped == 0, output, 0)


PEER_OPTIONS = {
    "repetition_penalty": 1.4,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 5,
    "suppress_tokens": [9, 30, 77],
    "forced_bos_token_id": 12,
    "forced_eos_token_id": 1,
}
FORCED = kt.ForcedTokens({0: 12, -1: 1})


def test_greedy_output_under_all_options_equals_transformers(pair, greedy):
    plain = greedy.generate(prompts(), max_length=LENGTH, stop_token_ids=STOPS)["decoder_token_ids"]
    got = greedy.generate(prompts(), max_length=LENGTH, stop_token_ids=STOPS, processors=[FORCED, *OPTIONS])
    np.testing.assert_array_equal(got["decoder_token_ids"], peer_generate(pair[0], **PEER_OPTIONS))
    assert (got["decoder_token_ids"] != plain).any()


def test_beams_under_all_options_equal_the_best_of_transformers(pair):
    peer, lm = pair
    lm.compile(sampler=kt.BeamSampler(num_beams=3))
    options = {"max_length": LENGTH, "stop_token_ids": STOPS, "processors": [FORCED, *OPTIONS]}
    got = lm.generate(prompts(), **options, num_samples=2, return_log_probs=True)
    expected = peer_generate(peer, **PEER_OPTIONS, num_beams=3, num_return_sequences=2)
    np.testing.assert_array_equal(got["decoder_token_ids"], expected.reshape(4, 2, LENGTH))
    # The log-probabilities are those of the beams returned, by the model alone.
    for i in range(2):
        ids, mask = (got[name][:, i, 1:] for name in ("decoder_token_ids", "decoder_padding_mask"))
        scores = lm.score(prompts(), {"decoder_token_ids": ids, "decoder_padding_mask": mask})
        np.testing.assert_allclose(got["log_probs"][:, i].sum(axis=1), scores["log_likelihood"], atol=2e-4)


def test_custom_processor_sees_the_sequences_and_changes_the_output(greedy):
    def never_twice_in_a_row(logits, sequences):
        last = ops.take(sequences.token_ids, sequences.index - 1, axis=1)
        return ops.where(ops.arange(logits.shape[1]) == ops.expand_dims(last, 1), -1e9, logits)

    options = {"max_length": LENGTH, "stop_token_ids": STOPS}
    got = greedy.generate(prompts(), **options, processors=[never_twice_in_a_row])["decoder_token_ids"]
    assert (got[:, 1:] != got[:, :-1])[got[:, 1:] != 0].all()


def test_log_probs_equal_score_and_the_log_softmax_of_transformers(pair, lm):
    starts = np.array([[2, 0, 0], [2, 9, 0], [2, 8, 7], [2, 0, 0]])
    inputs = {**prompts(), "decoder_token_ids": starts, "decoder_padding_mask": starts != 0}
    options = {"max_length": LENGTH, "stop_token_ids": STOPS[:4], "processors": list(OPTIONS)}
    got = lm.generate(inputs, **options, seed=3, strip_prompt=True, return_log_probs=True)
    whole = lm.generate(inputs, **options, seed=3)
    scores = lm.score(inputs, {name: got[name] for name in ("decoder_token_ids", "decoder_padding_mask")})
    width = scores["log_probs"].shape[1]
    np.testing.assert_allclose(got["log_probs"][:, :width], scores["log_probs"], atol=2e-4)
    assert not got["log_probs"][:, width:].any()
    np.testing.assert_allclose(scores["log_likelihood"], got["log_probs"].sum(axis=1), atol=1e-3)

    logits = hf_logits(pair[0], {**inputs, **whole}).astype(float)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(log_softmax[:, :-1], whole["decoder_token_ids"][:, 1:, None], axis=2)[..., 0]
    for row, start in enumerate((1, 2, 3, 1)):
        length = whole["decoder_padding_mask"][row].sum()
        np.testing.assert_allclose(
            scores["log_probs"][row, : length - start], expected[row, start - 1 : length - 1], atol=2e-4
        )


def test_score_does_not_depend_on_chunks_or_batch_mates(lm, monkeypatch):
    targets = [[5, 6, 7, 8, 9], [11, 12], [13] * 14, [1]]
    together = lm.score(prompts(), targets)
    assert together["log_probs"].shape == (4, 14)
    monkeypatch.setitem(CHUNK_BYTES, keras.config.backend(), 4 * 128 * 3)  # three positions of one row
    lm.compile()
    alone = lm.score({name: x[2] for name, x in prompts().items()}, targets[2])
    np.testing.assert_allclose(alone["log_probs"], together["log_probs"][2], atol=1e-5)


def test_samples_vary_repeat_under_a_seed_and_read_each_prompt_once(lm, monkeypatch):
    rows = []
    encoder = type(lm.backbone.encoder)
    call = encoder.call
    monkeypatch.setattr(
        encoder,
        "call",
        lambda self, ids, *args, **kwargs: rows.append(ids.shape[0]) or call(self, ids, *args, **kwargs),
    )
    options = {"max_length": LENGTH, "stop_token_ids": STOPS[:2], "num_samples": 3}
    first, again = (lm.generate(prompts(), **options, seed=7) for _ in range(2))
    assert set(rows) == {4}
    assert first["decoder_token_ids"].shape == first["decoder_padding_mask"].shape == (4, 3, LENGTH)
    np.testing.assert_array_equal(first["decoder_token_ids"], again["decoder_token_ids"])
    assert all(len(np.unique(samples, axis=0)) == 3 for samples in first["decoder_token_ids"])
    other = lm.generate(prompts(), **options, seed=8)["decoder_token_ids"]
    assert (other != first["decoder_token_ids"]).any(axis=(1, 2)).all()


def test_seed_of_a_call_leaves_the_samplers_own_sequence_alone(lm):
    def run(between):
        lm.sampler.seed_generator.state.assign([11, 0])
        draws = []
        for _ in range(2):
            draws.append(lm.generate(prompts(), max_length=LENGTH, stop_token_ids=None)["decoder_token_ids"])
            if between:
                lm.generate(prompts(), max_length=LENGTH, stop_token_ids=None, seed=1)
        return draws

    without, with_seeds = run(False), run(True)
    np.testing.assert_array_equal(without, with_seeds)
    assert (without[0] != without[1]).any()


def test_limits_cut_each_row_and_leave_the_rest_as_it_was(greedy):
    starts = np.array([[2, 0, 0], [2, 9, 0], [2, 8, 7], [2, 0, 0]])
    inputs = {**prompts(), "decoder_token_ids": starts, "decoder_padding_mask": starts != 0}
    whole = greedy.generate(inputs, max_length=LENGTH, stop_token_ids=None)["decoder_token_ids"]
    got = greedy.generate(inputs, max_new_tokens=[3, 1, 12, 5], stop_token_ids=None)
    np.testing.assert_array_equal(got["decoder_padding_mask"].sum(axis=1), [4, 3, 15, 6])
    np.testing.assert_array_equal(got["decoder_token_ids"], np.where(got["decoder_padding_mask"], whole[:, :15], 0))


def test_limited_beams_are_what_each_row_gives_alone(pair):
    peer, lm = pair
    lm.compile(sampler=kt.BeamSampler(num_beams=3))
    got = lm.generate(prompts(), max_new_tokens=[4, 15, 15, 15], stop_token_ids=STOPS)["decoder_token_ids"]
    np.testing.assert_array_equal(got[1:], peer_generate(peer, num_beams=3)[1:])
    np.testing.assert_array_equal(got[0], peer_generate(peer, length=5, num_beams=3)[0])


def test_loop_ends_when_every_row_has_stopped_or_is_full(pair):
    _, lm = pair
    steps = []

    class Counting(keras_hub.samplers.GreedySampler):
        def run_loop(self, cond, body, **kwargs):
            state = super().run_loop(cond, body, **kwargs)
            steps.append(state[2])
            return state

    lm.compile(sampler=Counting(), run_eagerly=True)
    lm.generate(prompts(), max_new_tokens=[3, 4, 2, 15], stop_token_ids=range(128))
    assert int(steps[-1]) == 2  # <bos> and one token, at which every row stops
    lm.generate(prompts(rows=3), max_new_tokens=[3, 4, 2], stop_token_ids=None)
    assert int(steps[-1]) == 5


def test_mixed_requests_repeat_under_seeds_in_as_many_programs_as_options(lm):
    requests = [
        {"seed": seed, **options}
        for seed in range(4)
        for options in (
            {},
            {"processors": [kt.RepetitionPenalty(1.3), kt.ForbiddenTokens([5, seed // 9])]},
            {"num_samples": 2, "max_new_tokens": [2 + seed, 9, 3, 4]},
            {"num_samples": 2, "max_new_tokens": [1, 9, 2 + seed, 3]},
        )
    ]
    for request in requests:
        request.setdefault("max_length", None if "max_new_tokens" in request else 10)

    def run():
        return [lm.generate(prompts(), stop_token_ids=(1,), **request)["decoder_token_ids"] for request in requests]

    for first, again in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(first, again)
    assert len(lm.programs.values("generate")) == 3


def test_programs_of_options_made_anew_each_time_are_not_kept_for_ever(lm):
    for _ in range(100):
        generate_program(lm, Control(processors=(lambda logits, _: logits,)))
    assert len(lm.programs) <= 64


def test_program_that_asks_for_another_leaves_no_more_than_are_kept():
    programs = Programs(2)
    for number in range(5):
        made = programs.get(("outer", number), lambda number=number: [programs.get(("inner", number), object)])
        assert programs.get(("outer", number), object) is made
        assert len(programs) == 2


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("greedy", {"num_samples": 2}, "`num_samples` needs a sampler that draws at random, or beam search"),
        ("greedy", {"num_samples": 0}, "`num_samples` must be a positive integer"),
        ("beam", {"num_samples": 6}, "`num_samples` must be at most 5"),
        ("contrastive", {"processors": OPTIONS}, "`processors` are not available with ContrastiveSampler"),
        ("contrastive", {"return_log_probs": True}, "`return_log_probs` is not available with ContrastiveSampler"),
        (kt.TopKTopPSampler(k=129), {}, "`k` must be at most 128"),
        ("greedy", {"seed": -1}, "`seed` must be an integer of at least 0"),
        ("greedy", {"max_new_tokens": 3}, "`max_new_tokens` and `max_length` both limit the result"),
        ("greedy", {"max_length": None, "max_new_tokens": [1, 2]}, "`max_new_tokens` must be .* one per row, 4"),
        ("greedy", {"max_length": None, "max_new_tokens": 0}, "`max_new_tokens` must be a positive integer"),
        ("greedy", {"processors": [kt.MinimumLength(16)]}, "leaves room for 15"),
        ("greedy", {"processors": [kt.ForbiddenTokens([128])]}, r"must hold ids in \[0, 128\)"),
    ],
)
def test_request_that_cannot_be_met_is_one_clear_error(pair, sampler, options, message):
    _, lm = pair
    lm.compile(sampler=sampler)
    with pytest.raises(ValueError, match=message):
        lm.generate(prompts(), stop_token_ids=(1,), **{"max_length": LENGTH, **options})


def test_sampler_that_is_too_cold_is_refused(pair):
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        pair[1].compile(sampler=keras_hub.samplers.RandomSampler(temperature=0.0))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[1], [2]], "`targets` must have a row per prompt, 4"),
        ([[1], [], [2], [3]], "Received in row 1"),
        ([[1], [2], [3], [128]], r"`targets` must be in \[0, 128\)"),
        ("text", "`targets` must be rows of ids"),
    ],
)
def test_bad_targets_are_named(greedy, targets, message):
    with pytest.raises(ValueError, match=message):
        greedy.score(prompts(), targets)
