"""`stop`: answers end before the first of several texts, each as it would alone."""

import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer

import keras_t5gemma as kt
from keras_t5gemma.inference.decoding.chunks import DecodingStream

LENGTH = 40
PROMPTS = {
    "encoder_text": ["Why is the sky blue?", "Knock knock", "def add(first, second):"],
    "decoder_text": ["Because é", "", "The quick brown"],
}
ONE = {name: texts[0] for name, texts in PROMPTS.items()}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A model whose answers are pieces at random, with many characters of several bytes."""
    tokenizer = kt.T5GemmaTokenizer(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))
    backbone = loud_backbone(tiny_config(balanced=False, num_layers=1, vocabulary_size=512))
    lm = kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 32, LENGTH))
    lm.compile(sampler=kt.TopKTopPSampler(temperature=2.0, seed=1))
    return lm


@pytest.fixture(scope="module")
def whole(lm):
    """The whole answers, two per prompt, without their prompts."""
    return lm.generate(PROMPTS, seed=3, num_samples=2, strip_prompt=True, return_log_probs=True)


def cut(text, stops):
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


def stops_of(texts):
    """Stop strings from the answers: long ones, from within pieces, of single characters, and one that never comes."""
    joined = [text for texts_of_a_prompt in texts for text in texts_of_a_prompt]
    long = [text[len(text) // 2 :][:7] for text in joined]
    return [long[:1], long[1:3], [long[4], "never"], [joined[5][9]], [joined[0][20:22], joined[0][18:25]], ["never"]]


def test_answers_with_stop_strings_are_whole_answers_cut_at_the_first(lm, whole):
    for stops in stops_of(whole["text"]):
        result = lm.generate(PROMPTS, seed=3, num_samples=2, strip_prompt=True, return_log_probs=True, stop=stops)
        expected = [[cut(text, stops) for text in texts] for texts in whole["text"]]
        assert result["text"] == expected
        assert (expected == whole["text"]) == (stops == ["never"])
        # The ids are the whole answers' up to the token that completes the text.
        for row in np.ndindex(result["decoder_token_ids"].shape[:2]):
            count = result["decoder_padding_mask"][row].sum()
            for name in ("decoder_token_ids", "log_probs"):
                np.testing.assert_allclose(result[name][row][:count], whole[name][row][:count], atol=1e-4)
                assert not result[name][row][count:].any()
            kept = [text_of(lm, result["decoder_token_ids"][row][:n]) for n in (count, max(count - 1, 0))]
            text = result["text"][row[0]][row[1]]
            assert kept[0].startswith(text)
            assert not text or not kept[1].startswith(text) or text == whole["text"][row[0]][row[1]]


def text_of(lm, ids):
    return lm.preprocessor.tokenizer.detokenize(ids[lm.preprocessor.has_text(ids)].tolist())


def test_stop_strings_in_the_decoder_prompt_do_not_count(lm):
    whole = lm.generate(PROMPTS, seed=3)
    stops = [" quick", "é", whole[2][-6:]]
    starts = list(map(len, PROMPTS["decoder_text"]))
    expected = [text[:n] + cut(text[n:], stops) for text, n in zip(whole, starts, strict=True)]
    assert lm.generate(PROMPTS, seed=3, stop=stops) == expected
    assert expected[2].startswith("The quick brown")
    assert len(expected[2]) < len(whole[2])


def test_stream_holds_back_what_may_become_a_stop_string(lm):
    whole = lm.generate(ONE, seed=3)
    start = len(ONE["decoder_text"])
    middle = start + (len(whole) - start) // 2
    for stops in ([whole[middle : middle + 9]], [whole[middle : middle + 9] + "?", whole[-1]], ["never"]):
        expected = whole[:start] + cut(whole[start:], stops)
        assert lm.generate(ONE, seed=3, stop=stops) == expected
        pieces = list(lm.stream(ONE, seed=3, stop=stops, chunk_size=2))
        assert "".join(pieces) == expected
        assert len(pieces) > 3
        assert all(pieces)


def test_decoding_ends_soon_after_the_last_row_has_stopped(lm, whole, monkeypatch):
    ends = []
    monkeypatch.setattr(DecodingStream, "__call__", spied(DecodingStream.__call__, ends))
    firsts = [texts[0][3] for texts in whole["text"]] + [texts[1][3] for texts in whole["text"]]
    lm.generate(PROMPTS, seed=3, num_samples=2, strip_prompt=True, return_log_probs=True, stop=firsts)
    assert ends[-1] < LENGTH - 8


def spied(call, ends):
    def spy(self, *arguments):
        for state, chunk in call(self, *arguments):
            ends.append(chunk.stop)
            yield state, chunk

    return spy


def test_row_stops_as_it_would_alone(lm):
    lm.compile(sampler="greedy")
    options = {"max_length": LENGTH, "stop_token_ids": None}
    whole = lm.generate(PROMPTS, **options)
    stops = [text[-9:-5] for text in whole[:2]]
    together = lm.generate(PROMPTS, stop=stops, **options)
    starts = list(map(len, PROMPTS["decoder_text"]))
    assert together == [text[:n] + cut(text[n:], stops) for text, n in zip(whole, starts, strict=True)]
    rows = [{name: texts[i] for name, texts in PROMPTS.items()} for i in range(3)]
    assert together == [lm.generate(row, stop=stops, **options) for row in rows]
    assert [text in whole for text in together[:2]] == [False, False]


@pytest.mark.parametrize("stop", ["", ["a", ""], [3], 3, ["a"] * 65, {"a": 1}])
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_invalid_stop_strings_are_refused(lm, method, stop):
    with pytest.raises(ValueError, match="`stop` must be a string or a list of strings"):
        getattr(lm, method)("a", stop=stop)


def test_stop_strings_need_a_preprocessor():
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(num_layers=1)))
    with pytest.raises(ValueError, match="Pass the ids"):
        lm.generate({"encoder_token_ids": [[5]]}, 8, None, stop="a")


def test_beam_search_is_cut_at_the_end(lm):
    lm.compile(sampler=kt.BeamSampler(num_beams=2))
    options = {"num_samples": 2, "return_log_probs": True, "max_length": 16, "stop_token_ids": None}
    whole = lm.generate(PROMPTS["encoder_text"], **options)
    stop = whole["text"][0][0][4:6]
    result = lm.generate(PROMPTS["encoder_text"], stop=stop, **options)
    assert result["text"] == [[cut(text, [stop]) for text in texts] for texts in whole["text"]]
    assert result["decoder_padding_mask"][0, 0].sum() < whole["decoder_padding_mask"][0, 0].sum()
