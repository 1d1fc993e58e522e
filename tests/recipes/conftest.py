"""What the recipe `tiny` trains on: a Gemma 2, a corpus and held-out text, in the folder the command runs in."""

import contextlib

import pytest

import keras_t5gemma as kt
from keras_t5gemma.config import StackConfig
from keras_t5gemma.demo.pretraining import build_gemma2, save_gemma2

TEXT = "The quick brown fox jumps over the lazy dog, and why is the sky blue? Air scatters blue light more than red.\n"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The folder."""
    folder = tmp_path_factory.mktemp("recipes")
    proto = kt.train_tokenizer([TEXT], 440)
    save_gemma2(build_gemma2(StackConfig(1, 16, 24, 2, 1, 8, sliding_window=8), 440), proto, folder / "gemma2")
    for name, lines in (("corpus", 40), ("held_out", 10)):
        (folder / f"{name}.txt").write_text(TEXT * lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def here(tiny_folder):
    """The folder, which is the current one for as long as a file's tests run."""
    with contextlib.chdir(tiny_folder):
        yield tiny_folder
