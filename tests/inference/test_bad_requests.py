"""Requests that cannot be met: one error each, which names the argument, and a model that answers the next one."""

import keras_hub
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer

import keras_t5gemma as kt

IDS = {"encoder_token_ids": [[5, 6, 7], [8, 9, 10]]}


@pytest.fixture(scope="module")
def lm():
    return kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(num_layers=1)))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model with a tokenizer, for prompts of 8 tokens."""
    tokenizer = kt.T5GemmaTokenizer(
        proto=train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    )
    backbone = loud_backbone(tiny_config(num_layers=1, vocabulary_size=512))
    return kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 8, 8))


BAD_IDS = [
    (
        {"inputs": {"encoder_token_ids": np.zeros((0, 4), int)}},
        "`encoder_token_ids` must be a non-empty",
    ),
    ({"inputs": {"encoder_token_ids": np.zeros((2, 0), int)}}, "`encoder_token_ids` must be a non-empty"),
    (
        {"inputs": {**IDS, "encoder_padding_mask": [[1, 1, 1], [0, 0, 0]]}},
        "`encoder_token_ids` has a row with no token",
    ),
    ({"inputs": {**IDS, "decoder_token_ids": [[2]]}}, "`decoder_token_ids` has 1 rows and `encoder_token_ids` 2"),
    ({"inputs": {"encoder_token_ids": [[5, 128]]}}, r"`encoder_token_ids` must be in \[0, 128\)"),
    ({"inputs": {"encoder_token_ids": [[5.0, 6.0]]}}, "`encoder_token_ids` must hold integers"),
    ({"inputs": "a text"}, "Without a preprocessor the model takes a dict"),
    ({"inputs": {**IDS, "decoder_token_ids": [[2, 5, 6]] * 2}, "max_length": 2}, "the longest here has 3 tokens"),
    ({"max_length": 0}, "max_length=0"),
    ({"max_length": -3}, "max_length=-3"),
    ({"max_length": 6.5}, r"`max_length` must be a positive integer, or None. Received: max_length=6\.5"),
    ({"stop_token_ids": (1, 128)}, r"`stop_token_ids` must be in \[0, 128\). Received: \[128\]"),
    ({"stop_token_ids": (-1,)}, r"`stop_token_ids` must be in \[0, 128\). Received: \[-1\]"),
    ({"stop_token_ids": 1}, '`stop_token_ids` must be a sequence of ids, "auto" or None. Received: 1'),
    ({"stop_token_ids": "eos"}, "`stop_token_ids` must be a sequence of ids"),
    ({"stop_token_ids": (1.5,)}, "`stop_token_ids` must be a sequence of ids"),
    ({"stop_token_ids": "auto"}, 'stop_token_ids="auto" reads the ids off the tokenizer'),
]


@pytest.mark.parametrize(("changed", "message"), BAD_IDS)
def test_bad_request_of_ids_is_one_clear_error(lm, changed, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(**{"inputs": IDS, "max_length": 6, "stop_token_ids": (1,), **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inputs": []}, "`encoder_text` is an empty list"),
        ({"inputs": ["a", ""]}, r"`encoder_text`\[1\] is empty"),
        ({"inputs": "a" * 9}, "takes 9 tokens, more than encoder_sequence_length=8"),
        (
            {"inputs": {"encoder_text": "a", "decoder_text": "aaaa"}, "max_length": 4},
            "takes 5 tokens, more than `max_length`",
        ),
        ({"max_length": 0}, "`max_length` must be a positive integer"),
        ({"stop_token_ids": (512,)}, r"`stop_token_ids` must be in \[0, 512\)"),
    ],
)
def test_bad_request_of_texts_is_one_clear_error(chatty, changed, message):
    request = {"inputs": "a", "max_length": 6, **changed}
    with pytest.raises(ValueError, match=message):
        chatty.generate(**request)
    with pytest.raises(ValueError, match=message):
        chatty.stream(**request)


@pytest.mark.parametrize("method", ["score", "embed"])
def test_nothing_to_score_or_to_embed_is_one_clear_error(lm, chatty, method):
    arguments = ([],) if method == "score" else ()
    with pytest.raises(ValueError, match="empty list"):
        getattr(chatty, method)([], *arguments)
    with pytest.raises(ValueError, match=r"at least one|non-empty"):
        getattr(lm, method)({"encoder_token_ids": np.zeros((0, 3), int)}, *arguments)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("best", "best"),
        (None, "`sampler` must be a name or a keras_hub.samplers.Sampler"),
        (keras_hub.samplers.GreedySampler, "`sampler` must be a name or a keras_hub.samplers.Sampler"),
        (keras_hub.samplers.BeamSampler(return_all_beams=True), "`return_all_beams=True` is not available"),
        (keras_hub.samplers.RandomSampler(temperature=0), "`temperature` must be above 0"),
    ],
)
def test_sampler_that_is_none_is_refused_and_the_one_before_stays(lm, sampler, message):
    before = lm.sampler
    with pytest.raises(ValueError, match=message):
        lm.compile(sampler=sampler)
    assert lm.sampler is before


def test_model_answers_after_bad_requests_what_it_did_before(lm):
    def answer():
        return lm.generate(IDS, max_length=6, stop_token_ids=(1,))["decoder_token_ids"]

    before = answer()
    for changed, _ in BAD_IDS:
        with pytest.raises(ValueError, match=r"."):
            lm.generate(**{"inputs": IDS, "max_length": 6, "stop_token_ids": (1,), **changed})
    np.testing.assert_array_equal(answer(), before)
