"""`score` with several targets per prompt, and whether greedy decoding would give them."""

import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone

import keras_t5gemma as kt

CONFIG = tiny_config(num_layers=3)  # windows of 5
INPUTS = {name: x for name, x in loud_inputs(CONFIG, batch=3).items() if name.startswith("encoder")}
STARTS = {
    "decoder_token_ids": [[2, 9, 0], [2, 0, 0], [2, 8, 7]],
    "decoder_padding_mask": [[1, 1, 0], [1, 0, 0], [1, 1, 1]],
}
TARGETS = [[[5, 6, 7], [11]], [[12, 13, 14, 15, 16, 17, 18, 19], [20, 21]], [[22], [23, 24]]]


@pytest.fixture(scope="module")
def lm():
    return kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG))


def one(x, row):
    return {name: np.asarray(array)[row : row + 1] for name, array in x.items()}


@pytest.mark.parametrize("starts", [{}, STARTS], ids=["from <bos>", "after a start"])
@pytest.mark.parametrize("targets", [TARGETS, [*TARGETS[:2], [[30], [31, 32], [33]]]], ids=["as many", "more and less"])
def test_several_targets_score_what_each_scores_alone(lm, starts, targets):
    prompts = {**INPUTS, **starts}
    scores = lm.score(prompts, targets)
    for i, group in enumerate(targets):
        for j, target in enumerate(group):
            alone = lm.score(one(prompts, i), [target])
            np.testing.assert_allclose(scores["log_likelihood"][i][j], alone["log_likelihood"][0], atol=1e-4)
            np.testing.assert_allclose(scores["log_probs"][i][j, : len(target)], alone["log_probs"][0], atol=1e-4)
            assert not scores["log_probs"][i][j, len(target) :].any()
            assert scores["is_greedy"][i][j] == alone["is_greedy"][0]


def test_several_targets_in_bfloat16_score_what_float32_scores():
    """A target of 8 tokens may be off by 8 roundings of logits, which are at most 30; alone, by as many again."""
    half, whole = (kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG, dtype=dtype)) for dtype in ("bfloat16", "float32"))
    scores = half.score(INPUTS, TARGETS)
    exact = whole.score(INPUTS, TARGETS)
    for i, group in enumerate(TARGETS):
        np.testing.assert_allclose(scores["log_likelihood"][i], exact["log_likelihood"][i], rtol=0.02, atol=0.3)
        alone = [half.score(one(INPUTS, i), [target])["log_likelihood"][0] for target in group]
        np.testing.assert_allclose(scores["log_likelihood"][i], alone, rtol=0.02, atol=0.3)


def test_several_targets_of_a_prompt_without_batch_have_no_batch(lm):
    prompt = {name: x[1] for name, x in INPUTS.items()}
    scores = lm.score(prompt, TARGETS[1])
    assert {name: x.shape for name, x in scores.items()} == {
        "log_likelihood": (2,),
        "is_greedy": (2,),
        "log_probs": (2, 8),
    }
    np.testing.assert_allclose(scores["log_likelihood"], lm.score(INPUTS, TARGETS)["log_likelihood"][1], atol=1e-4)
    assert np.ndim(lm.score(prompt, TARGETS[1][:1])["log_likelihood"]) == 0  # a list of one is one target


def test_target_is_greedy_if_it_is_what_greedy_decoding_gives(lm):
    lm.compile(sampler="greedy")
    answers = lm.generate(INPUTS, max_length=8, stop_token_ids=None)["decoder_token_ids"][:, 1:]
    changed = answers.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 128
    scores = lm.score(INPUTS, [list(pair) for pair in zip(answers, changed, strict=True)])
    np.testing.assert_array_equal(scores["is_greedy"], [[True, False]] * 3)


def test_prompt_is_encoded_once(lm, monkeypatch):
    seen, encode = [], type(lm.backbone.encoder).call

    def spied(self, token_ids, *args, **kwargs):
        seen.append(token_ids.shape[0])
        return encode(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(type(lm.backbone.encoder), "call", spied)
    lm.compile(run_eagerly=True)
    lm.score(one(INPUTS, 0), [[[token] for token in range(3, 23)]])
    assert seen == [1]
    lm.compile()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[5], [[6], [7]], [[8]]], "Received: 3, of which 2 are lists"),
        (TARGETS[:2], "3 in all. Received: 2, of which 2 are lists"),
        ([[[5], [6]], [[7]], [[]]], "at least one integer"),
    ],
    ids=["some lists", "too few", "an empty target"],
)
def test_targets_that_do_not_match_the_prompts_are_refused(lm, targets, message):
    with pytest.raises(ValueError, match=message):
        lm.score(INPUTS, targets)
