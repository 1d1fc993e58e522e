"""`encode`: prompts that are encoded once, and `truncate`: prompts that are cut for one call."""

import re
import warnings

import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

import keras_t5gemma as kt

CONFIG = tiny_config(balanced=False, num_layers=1, vocabulary_size=512)
PROMPTS = {
    "encoder_text": ["Why is the sky blue?", "Knock knock", "def add(first, second):"],
    "decoder_text": ["Because", "", "The quick"],
}
LENGTH = 16
OPTIONS = {"max_length": LENGTH, "stop_token_ids": None}
LONG = ["Why is the sky blue? " * 3, "Knock", "The quick brown fox. " * 3]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    tokenizer = kt.T5GemmaTokenizer(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG), kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 16, LENGTH))
    lm.compile(sampler=kt.TopKTopPSampler(temperature=2.0, seed=1))
    return lm


def row(prompts, i):
    return {name: texts[i] for name, texts in prompts.items()}


def test_encoded_prompts_give_what_prompts_give(lm):
    encoded = lm.encode(PROMPTS)
    assert repr(encoded) == f"EncodedPrompts(3 prompts of up to {encoded.encoder_token_ids.shape[1]} tokens)"
    options = {**OPTIONS, "seed": 2, "return_log_probs": True}
    expected, result = lm.generate(PROMPTS, **options), lm.generate(encoded, **options)
    assert result["text"] == expected["text"]
    np.testing.assert_array_equal(result["decoder_token_ids"], expected["decoder_token_ids"])
    assert_equal_numbers(result["log_probs"], expected["log_probs"])
    stops = [expected["text"][0][-3:]]
    assert lm.generate(encoded, stop=stops, seed=2, **OPTIONS) == lm.generate(PROMPTS, stop=stops, seed=2, **OPTIONS)

    single = encoded[1]
    assert len(single) == 1
    assert lm.generate(single, seed=2, **OPTIONS) == lm.generate(row(PROMPTS, 1), seed=2, **OPTIONS)
    assert "".join(lm.stream(encoded[2:], seed=2, **OPTIONS)) == "".join(lm.stream(row(PROMPTS, 2), seed=2, **OPTIONS))
    assert [len(rows) for rows in (encoded[[2, 0]], encoded[:2], list(encoded))] == [2, 2, 3]


def test_encoded_prompts_score_what_prompts_score(lm):
    encoded = lm.encode(PROMPTS)
    targets = ["air", "who", " brown"]
    several = [["air", "light"], ["who", "there"], [" brown", " fox"]]
    for answers in (targets, several):
        expected, result = lm.score(PROMPTS, answers), lm.score(encoded, answers)
        for name, values in expected.items():
            assert_equal_numbers(result[name], values)
    assert_equal_numbers(lm.score(encoded[[2, 1]], several[:0:-1])["log_probs"], expected["log_probs"][:0:-1])


def assert_equal_numbers(result, expected):
    # A program with the encoder in it rounds otherwise than one without.
    np.testing.assert_allclose(result, expected, atol=1e-5, rtol=0)


def test_encoder_does_not_run_again(lm):
    encoded, before = lm.encode(PROMPTS), lm.generate(PROMPTS, seed=2, **OPTIONS)
    table = lm.backbone.encoder.token_embedding.embeddings
    kept = ops.convert_to_numpy(table)
    table.assign(-kept)
    try:
        assert lm.generate(encoded, seed=2, **OPTIONS) == before
        assert lm.generate(PROMPTS, seed=2, **OPTIONS) != before
    finally:
        table.assign(kept)


def test_prompts_that_another_model_encoded_are_refused(lm):
    encoded = lm.encode(PROMPTS)
    other = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG), lm.preprocessor)
    with pytest.raises(ValueError, match="encoded by another model"):
        other.generate(encoded)
    with pytest.raises(ValueError, match=re.escape("Pass truncate='left' to `encode`")):
        lm.generate(encoded, truncate="left")
    with pytest.raises(ValueError, match="No prompt is left of 3"):
        encoded[3:]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_cut_for_one_call_with_one_warning(lm, side):
    size = len(lm.preprocessor.tokenizer(LONG[0])), len(lm.preprocessor.tokenizer(LONG[2]))
    message = f"2 of 3 prompts were longer than 16 tokens and were cut on the {side}; the longest had {max(size)}."
    ids = [lm.preprocessor.tokenizer(text).tolist() for text in LONG]
    ids = [row[-16:] if side == "left" else row[:16] for row in ids]
    mask = np.array([[1] * len(row) + [0] * (16 - len(row)) for row in ids])
    ids = np.array([row + [0] * (16 - len(row)) for row in ids])
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        vectors = lm.embed(LONG, truncate=side)
    assert files_of(caught) == [__file__]
    without_texts = kt.T5GemmaSeq2SeqLM(lm.backbone)
    np.testing.assert_allclose(
        vectors, without_texts.embed({"encoder_token_ids": ids, "encoder_padding_mask": mask}), atol=1e-4
    )
    for call in (
        lambda: lm.generate(LONG, truncate=side, **OPTIONS),
        lambda: lm.encode(LONG, truncate=side),
        lambda: lm.score(LONG, ["a", "b", "c"], truncate=side),
    ):
        with pytest.warns(UserWarning, match=re.escape(message)) as caught:
            call()
        assert files_of(caught) == [__file__]
    with pytest.warns(UserWarning, match=f"^1 of 1 prompts was longer than 16 tokens and was cut on the {side}"):
        lm.stream(LONG[0], truncate=side)
    # The preprocessor is as before, and so are prompts that fit.
    assert lm.preprocessor.truncate is None
    with pytest.raises(ValueError, match="more than encoder_sequence_length=16"):
        lm.generate(LONG)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cut on")
        lm.embed(LONG[1], truncate=side)


def files_of(caught):
    """Where the warnings of prompts that were cut point to; PyTorch may have others."""
    return [entry.filename for entry in caught if "cut on" in str(entry.message)]


def test_targets_that_are_cut_are_counted_too(lm):
    with pytest.warns(UserWarning, match=r"^1 of 2 answers was longer than 16 tokens and was cut on the right"):
        lm.score(["a", "b"], ["c", LONG[0]], truncate="right")


def test_invalid_truncation_is_refused(lm):
    with pytest.raises(ValueError, match=r"`truncate` must be one of left, right"):
        lm.generate("a", truncate="middle")
    with pytest.raises(ValueError, match="`truncate` cuts texts"):
        kt.T5GemmaSeq2SeqLM(lm.backbone).embed([[5]], truncate="left")
