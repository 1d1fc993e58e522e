"""`HarnessLM` beside the harness's own `HFLM` on the same weights, and what it does where that one cannot serve."""

import numpy as np
import pytest
import transformers
from helpers.copying import WORDS, question
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

import keras_t5gemma as kt

CONTEXTS = (
    "Why is the sky blue?\nAnswer:",
    "The quick brown fox ",
    "Translate the text.\n\n",
    "",
    "Question: apples or pears? Answer the question. 12 pears, air, because light is blue.\nAnswer:",
)
CONTINUATIONS = (" blue", " red light than", " the lazy dog.")
TURNS = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"


def instances(kind, rows):
    return [Instance(request_type=kind, doc={}, arguments=tuple(row), idx=0) for row in rows]


def peer_of(lm, folder):
    """The harness's own model of the same weights."""
    kt.export_to_hugging_face(lm, folder)
    return HFLM(
        pretrained=transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        backend="seq2seq",
        batch_size=4,
        max_length=512,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported") / "model"


@pytest.fixture(scope="module")
def peer(loud_lm, folder):
    return peer_of(loud_lm, folder)


@pytest.fixture(scope="module")
def ours(loud_lm):
    return kt.HarnessLM(loud_lm, batch_size=3)


def assert_scores_agree(ours, peer, rows):
    found = ours.loglikelihood(instances("loglikelihood", rows))
    expected = peer.loglikelihood(instances("loglikelihood", rows), disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=0, atol=1e-4)
    assert [x for _, x in found] == [x for _, x in expected]
    return [x for _, x in found]


def test_log_likelihoods_are_those_of_the_harness_own_model(ours, peer):
    assert_scores_agree(ours, peer, [(context, text) for context in CONTEXTS for text in CONTINUATIONS])


def test_answers_are_those_of_the_harness_own_model(copying, tmp_path):
    ours, peer = kt.HarnessLM(copying, batch_size=3), peer_of(copying, tmp_path / "model")
    # Of one length, because the peer's answers depend on the length of its longest prompt.
    rows = [(question(word, 3), {"until": ["e", "ck"], "max_gen_toks": 8}) for word in WORDS]
    found = ours.generate_until(instances("generate_until", rows))
    assert found == peer.generate_until(instances("generate_until", rows), disable_tqdm=True)
    assert found == [" r", " blu", " gr", " bla", " whit", " brown", " gr", " pink"]
    rows = [(question(word, fillers), f" {answer}") for fillers, word in enumerate(WORDS[:4]) for answer in WORDS[:4]]
    assert assert_scores_agree(ours, peer, rows) == [i == j for i in range(4) for j in range(4)]


def test_all_continuations_of_a_context_are_scored_in_one_pass(ours, monkeypatch):
    calls, score = [], kt.T5GemmaSeq2SeqLM.score

    def spied(self, inputs, targets):
        calls.append((inputs["encoder_token_ids"].shape[0], list(map(len, targets))))
        return score(self, inputs, targets)

    monkeypatch.setattr(kt.T5GemmaSeq2SeqLM, "score", spied)
    rows = [(context, continuation) for continuation in CONTINUATIONS for context in CONTEXTS[:2]]
    ours.loglikelihood(instances("loglikelihood", rows))
    assert calls == [(2, [3, 3])]


def test_start_of_an_answer_is_read_by_the_decoder(ours, loud_lm, tokenizer):
    turns = TURNS.format("Why is the sky blue?")
    ((found, _),) = ours.loglikelihood(instances("loglikelihood", [(turns + "Because air", " scatters")]))
    ids = {"encoder_token_ids": [tokenizer(turns)], "decoder_token_ids": [[2, *tokenizer("Because air")]]}
    expected = kt.T5GemmaSeq2SeqLM(loud_lm.backbone).score(ids, [list(tokenizer(" scatters"))])["log_likelihood"]
    np.testing.assert_allclose([found], expected, atol=1e-4)


def test_rolling_is_refused_unless_halves_are_asked_for(ours, loud_lm):
    text = "The quick brown fox jumps over the lazy dog."
    with pytest.raises(ValueError, match='rolling="halves"'):
        ours.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    halves = kt.HarnessLM(loud_lm, rolling="halves", max_length=512)
    (found,) = halves.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    ids = list(halves.tokenizer(text))
    half = len(ids) // 2
    alone = kt.T5GemmaSeq2SeqLM(loud_lm.backbone).score({"encoder_token_ids": [ids[:half]]}, [ids[half:]])
    np.testing.assert_allclose(found, alone["log_likelihood"][0], atol=1e-4)


def test_long_contexts_are_cut_with_one_warning_that_counts_them(loud_lm):
    short = kt.HarnessLM(loud_lm, max_length=8)
    rows = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS[:1]]
    long = sum(len(short.tokenizer(context.rstrip())) > 8 for context in CONTEXTS if context)
    assert 0 < long < 5
    with pytest.warns(UserWarning, match=rf"{long} of 5 contexts have more than max_length=8 tokens") as warned:
        short.loglikelihood(instances("loglikelihood", rows))
    assert sum("contexts have" in str(one.message) for one in warned) == 1
    assert (short.truncated, short.get_model_info()["truncated_contexts"]) == (long, long)


def test_random_draws_are_the_same_in_each_run(loud_lm):
    rows = [(CONTEXTS[0], {"do_sample": True, "temperature": 5.0, "max_gen_toks": 6})] * 2
    first, second = (kt.HarnessLM(loud_lm, batch_size=1).generated(rows) for _ in range(2))
    assert first == second
    assert first[0] != first[1]


def test_unknown_generation_options_are_refused(ours):
    with pytest.raises(ValueError, match=r"Received: top_kk\. Did you mean 'top_k'"):
        ours.generated([("Why?", {"top_kk": 3})])
    with pytest.raises(ValueError, match="not both"):
        ours.generated([("Why?", {"do_sample": True, "temperature": 1.0, "num_beams": 2})])


def test_results_are_given_to_the_harness_cache(loud_lm):
    kept = {}

    class Hook:
        def add_partial(self, kind, arguments, result):
            kept[kind, arguments[0]] = result

    lm = kt.HarnessLM(loud_lm)
    lm.set_cache_hook(Hook())
    scores = lm.loglikelihood(instances("loglikelihood", [("Why?", " blue")]))
    (answer,) = lm.generate_until(instances("generate_until", [("Why?", {"max_gen_toks": 2})]))
    assert kept == {("loglikelihood", "Why?"): scores[0], ("generate_until", "Why?"): answer}


def test_harness_finds_the_model_by_its_name(folder, peer, loud_lm):
    lm = get_model("keras-t5gemma").create_from_arg_string(f"pretrained={folder},max_length=64", {"batch_size": "2"})
    assert (lm.max_length, lm.batch_size, lm.preset) == (64, 2, str(folder))
    assert lm.tokenizer_name == kt.HarnessLM(loud_lm).tokenizer_name
    with pytest.raises(ValueError, match="device: Keras chooses"):
        get_model("keras-t5gemma").create_from_arg_obj({"pretrained": str(folder)}, {"device": "cuda:0"})
    with pytest.raises(ValueError, match="Name the preset"):
        get_model("keras-t5gemma").create_from_arg_obj({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "`batch_size` must be a positive integer"),
        ({"truncate": "middle"}, "`truncate` must be one of left, right, or None"),
        ({"rolling": "half"}, "Did you mean 'halves'"),
    ],
)
def test_options_are_checked(loud_lm, options, message):
    with pytest.raises(ValueError, match=message):
        kt.HarnessLM(loud_lm, **options)


def test_model_without_a_tokenizer_is_refused(loud_lm):
    with pytest.raises(ValueError, match="with a preprocessor"):
        kt.HarnessLM(kt.T5GemmaSeq2SeqLM(loud_lm.backbone))


def test_users_model_keeps_its_preprocessor_and_sampler(ours, loud_lm):
    preprocessor, sampler = loud_lm.preprocessor, loud_lm.sampler
    ours.generated([("Why?", {"max_gen_toks": 2})])
    assert (loud_lm.preprocessor, loud_lm.sampler) == (preprocessor, sampler)
