"""A small vocabulary with Gemma's special ids, trained in well under a second: the tests' tokenizer."""

from pathlib import Path

from keras_t5gemma.text.train_tokenizer import train_tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Why is the sky blue? Because air scatters blue light more than red light.",
    "user and model take turns: knock knock, who is there?",
    "def add(first, second):\n    return first + second\n",
    "Summarise the text. Translate the text. Answer the question.",
    "In 2025 there were 12 apples, 34 pears and 5678 plums.",
)


def train_tiny_tokenizer(path, vocabulary_size=512, texts=TEXTS):
    """Train a vocabulary, write it to `path` (a `tokenizer.model`), and return that path."""
    train_tokenizer(texts, vocabulary_size, path)
    return Path(path)
