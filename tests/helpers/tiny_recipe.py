"""What the recipe `tiny` trains on: a Gemma 2, a corpus and held-out text."""

import keras_t5gemma as kt
from keras_t5gemma.config import StackConfig
from keras_t5gemma.demo.pretraining import build_gemma2, save_gemma2

TEXT = "The quick brown fox jumps over the lazy dog, and why is the sky blue? Air scatters blue light more than red.\n"


def write_tiny_recipe(folder):
    """Writes them into a folder, and returns it."""
    proto = kt.train_tokenizer([TEXT], 440)
    save_gemma2(build_gemma2(StackConfig(1, 16, 24, 2, 1, 8, sliding_window=8), 440), proto, folder / "gemma2")
    for name, lines in (("corpus", 40), ("held_out", 10)):
        (folder / f"{name}.txt").write_text(TEXT * lines, encoding="utf-8")
    return folder
