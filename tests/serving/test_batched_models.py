"""Batchers of models without a preprocessor, with LoRA, in bytes and in half precision."""

import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone

import keras_t5gemma as kt

CONFIG = tiny_config(balanced=False, num_layers=1, decoder={"num_layers": 2})
LENGTH = 11
PROMPTS = [{"encoder_token_ids": np.random.default_rng(n).integers(3, 128, n)} for n in (5, 8, 2)]


def model(**options):
    backbone = loud_backbone(CONFIG, **options)
    table = backbone.decoder.token_embedding.embeddings
    table.assign(0.3 * table)  # otherwise the likeliest token is always the last one again
    return kt.T5GemmaSeq2SeqLM(backbone, buckets=kt.Buckets((8,), (LENGTH,), (1,)))


def batcher_of(lm):
    return kt.Batcher(lm, slots=2, buckets=(8,), max_length=LENGTH)


def answers(batcher, **options):
    handles = [batcher.submit(prompt, stop_token_ids=None, **options) for prompt in PROMPTS]
    return [handle.result(60) for handle in handles]


def generated(lm):
    return [
        lm.generate(prompt, max_length=LENGTH, stop_token_ids=None)["decoder_token_ids"].tolist() for prompt in PROMPTS
    ]


def test_model_without_a_preprocessor_answers_in_ids_in_int8_and_follows_lora():
    lm = model()
    lm.quantize("int8")
    with batcher_of(lm) as batcher:
        handle = batcher.submit(PROMPTS[0], stop_token_ids=None)
        seen = [generated(lm)]
        assert list(handle) == handle.result(0).token_ids.tolist() == seen[0][0]
        assert handle.result(0).text is None
        stripped = batcher.submit(PROMPTS[0], stop_token_ids=None, strip_prompt=True)
        assert list(stripped) == seen[0][0][1:]
        assert [answer.token_ids.tolist() for answer in answers(batcher)] == seen[0]
        lm.backbone.enable_lora(2)
        for variable in lm.trainable_variables:
            variable.assign(np.random.default_rng(1).normal(0, 0.3, variable.shape))
        seen.append(generated(lm))
        assert [answer.token_ids.tolist() for answer in answers(batcher)] == seen[1]
        assert seen[0] != seen[1]


def test_bfloat16_answers_have_the_log_probabilities_of_score():
    lm = model(dtype="bfloat16")
    with batcher_of(lm) as batcher:
        for prompt, answer in zip(
            PROMPTS, answers(batcher, return_log_probs=True, temperature=2.0, seed=1), strict=True
        ):
            scores = lm.score(prompt, [answer.token_ids[1:].tolist()])
            np.testing.assert_allclose(scores["log_probs"], answer.log_probs[1:], atol=0.1)
            assert len(set(answer.token_ids)) > 3


@pytest.mark.parametrize("left", [{"buckets": (8,)}, {"max_length": 8}])
def test_model_without_a_preprocessor_needs_both_lengths(left):
    with pytest.raises(ValueError, match="pass `buckets` and `max_length`"):
        kt.Batcher(model(), **left)


def test_prompt_longer_than_the_largest_bucket_is_an_error():
    with batcher_of(model()) as batcher:
        with pytest.raises(ValueError, match="9 tokens, more than the batcher's largest bucket, 8"):
            batcher.submit({"encoder_token_ids": np.arange(3, 12)}, stop_token_ids=None)
        with pytest.raises(ValueError, match="empty row"):
            batcher.submit(
                {
                    "encoder_token_ids": [3],
                    "decoder_token_ids": [4, 5],
                    "decoder_padding_mask": [0, 0],
                },
                stop_token_ids=None,
            )
