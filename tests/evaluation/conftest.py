"""Tiny models for evaluation: a loud one, also as a folder for `transformers`, and one that has learned to copy."""

import pytest
from helpers.copying import copying_lm
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer

import keras_t5gemma as kt


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory):
    path = train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    return kt.T5GemmaTokenizer(proto=path.read_bytes())


@pytest.fixture(scope="package")
def loud_lm(tokenizer):
    """A random model with windows longer than the texts, because `transformers` counts the encoder's otherwise."""
    config = tiny_config(vocabulary_size=tokenizer.vocabulary_size(), sliding_window=128, num_layers=2)
    return kt.T5GemmaSeq2SeqLM(loud_backbone(config), kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer))


@pytest.fixture(scope="package")
def copying():
    """A model that has learned to answer "copy red:" by " red"."""
    return copying_lm()
