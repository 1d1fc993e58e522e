"""Trains a SentencePiece vocabulary in Gemma's layout, for models from scratch and for tests."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from keras_t5gemma.atomic_file import write_atomically
from keras_t5gemma.text.chat import END_OF_TURN, START_OF_TURN

# The first ids of Gemma's own tokenizer.model, in order. Four control pieces come from the trainer's own options. The
# others are user-defined: they are cut out of the text before any merge, at every place.
#   4 <mask> | 5 <2mass>, 6 [@BOS@]: never used | 7..105 <unused0>..<unused98> | 106, 107 turns | 108..138 newlines
_CONTROL = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
NUM_UNUSED = 99
_USER_DEFINED = [
    "<mask>",
    "<2mass>",
    "[@BOS@]",
    *(f"<unused{i}>" for i in range(NUM_UNUSED)),
    START_OF_TURN,
    END_OF_TURN,
    *("\n" * run for run in range(1, 32)),
]


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, path: str | os.PathLike[str] | None = None) -> bytes:
    r"""Trains a byte-pair vocabulary with Gemma's special ids and settings.

    As in Gemma, text is not normalized, whitespace is kept, each digit is a piece of its own, and characters outside
    the vocabulary fall back to bytes. So every string is decoded unchanged. The same texts in the same order give the
    same vocabulary.

    Args:
        texts: iterable of strings.
        vocabulary_size: V, the number of pieces. The fixed pieces (special ones, newlines, bytes) take 395; the
            characters of the texts and the merges come after them.
        path: file to write the model to, or `None` to write none.

    Returns:
        The serialized SentencePiece model, as bytes. `T5GemmaTokenizer(proto=...)` takes it, and Hugging Face does too,
        as a file named `tokenizer.model`.

    Raises:
        ValueError: if a text is not a string, there is no text, or the texts cannot fill the vocabulary or need a
            larger one. Then no file is written.
    """
    import sentencepiece

    lines = list(_lines(texts))
    if not lines:
        raise ValueError("`texts` holds nothing to train on: every text is empty or there is none.")
    model = io.BytesIO()
    control: dict[str, Any] = {f"{name}_id": token_id for name, token_id in _CONTROL.items()}
    control |= {f"{name}_piece": f"<{name}>" for name in _CONTROL}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocabulary_size,
            model_type="bpe",
            user_defined_symbols=_USER_DEFINED,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # The trainer silently drops longer lines. Its default is 4,192 bytes, its minimum 10.
            max_sentence_length=max(10, *(len(line.encode()) for line in lines)),
            minloglevel=2,
            **control,
        )
    except RuntimeError as error:
        raise ValueError(f"Cannot train with vocabulary_size={vocabulary_size!r} on these texts: {error}") from error
    if path is not None:
        write_atomically(Path(path), model.getvalue())
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The non-empty lines of the texts. Newlines are pieces of their own, so no merge goes across them."""
    if isinstance(texts, (str, bytes)):
        raise ValueError("`texts` must be an iterable of strings. Received a single one: wrap it in a list.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`texts` must hold strings. Received: texts[{index}]={text!r}.")
        yield from (line for line in text.split("\n") if line)
