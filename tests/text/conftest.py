"""One small tokenizer for all tests of text."""

import json
import shutil

import pytest
from helpers.tiny_tokenizer import train_tiny_tokenizer

from keras_t5gemma.text.tokenizer import T5GemmaTokenizer


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def tokenizer(model_file):
    return T5GemmaTokenizer(proto=model_file)


@pytest.fixture
def hugging_face_folder(model_file, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "t5gemma"}))
    shutil.copy(model_file, folder / "tokenizer.model")
    return folder
