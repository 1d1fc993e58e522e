"""A mistyped name is answered with the names there are, and the one that was probably meant."""

import numpy as np
import pytest
from helpers.peers import tiny_config

import keras_t5gemma as kt
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.suggestions import did_you_mean


@pytest.fixture(scope="module")
def lm():
    return kt.T5GemmaSeq2SeqLM(T5GemmaBackbone(**tiny_config(num_layers=1).to_dict()))


# What is called, and what its message says: the names there are, and which of them was meant.
MISTYPED = [
    (lambda lm: lm.compile(sampler="beem"), "greedy, beam, top_k, top_p, random, contrastive", "beam"),
    (lambda lm: lm.compile(sampler="TopK"), "`sampler` must be one of greedy", "top_k"),
    (lambda lm: lm.embed({"encoder_token_ids": [[5]]}, pooling="men"), "mean, last", "mean"),
    (lambda _: kt.T5GemmaSeq2SeqLM.from_preset("t5gemma-2b-2b-ul2"), "presets", "t5gemma_2b_2b_ul2"),
    (lambda _: kt.T5GemmaSeq2SeqLM.from_preset("google/t5gemma-2b-2b-ul2"), "hf://owner", "t5gemma_2b_2b_ul2"),
    (lambda _: kt.T5GemmaTokenizer.from_preset("T5Gemma_9B_2B_UL2_IT"), "presets", "t5gemma_9b_2b_ul2_it"),
    (lambda _: kt.T5GemmaBackbone("2B", "2b"), "Known sizes: s, b,", "2b"),
    (lambda _: kt.adapt_gemma2("google/gemma-2-2b", "gemma2_2b_en"), "gemma2_2b_en, ", "gemma2_2b_en"),
    (lambda _: kt.objective("prefix-lm", 8, 8), "prefixlm, span_corruption", "prefixlm"),
    (lambda _: kt.UL2(8, 8, mixture="ul-2"), "ul2, t5gemma2", "ul2"),
    (lambda _: kt.optimizer("AdamW", learning_rate=1.0, steps=1), "adamw, adafactor, muon", "adamw"),
    (lambda _: kt.StackConfig.from_dict({"num_layer": 1}), "Known fields: ", "num_layers"),
    (lambda _: kt.text_source(__file__, format="json"), "array_record, jsonl", "jsonl"),
    (
        lambda _: kt.pretraining_dataset([np.arange(9)], None, kt.PrefixLM(2, 2), batch_size=1, documents="join"),
        "joined, whole",
        "joined",
    ),
]


@pytest.mark.parametrize(("call", "names", "meant"), MISTYPED)
def test_mistyped_name_is_answered_with_the_names_and_the_one_meant(lm, call, names, meant):
    with pytest.raises(ValueError) as error:
        call(lm)
    assert names in str(error.value)
    assert str(error.value).endswith(f"Did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("T5Gemma-2B-2B", "t5gemma_2b_2b"),
        ("hf://google/t5gemma-9b-2b", "t5gemma_9b_2b"),
        ("t5gema_2b_2b", "t5gemma_2b_2b"),
        ("bert", None),
        ("", None),
        (None, None),
    ],
)
def test_did_you_mean_overlooks_case_dashes_and_owners(name, near):
    known = ["t5gemma_2b_2b", "t5gemma_9b_2b"]
    assert did_you_mean(name, known) == (f" Did you mean {near!r}?" if near else "")
