"""Trains a SentencePiece vocabulary in Gemma's layout, for models from scratch and for tests."""

import io
import os
from pathlib import Path

from keras_t5gemma.text.chat import END_OF_TURN, START_OF_TURN

# The first ids of Gemma's own tokenizer.model, in order. Four control pieces come from the trainer's own options;
# the others are user-defined: cut out of the text before any merge, wherever they stand.
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


def train_tokenizer(texts, vocabulary_size, path=None):
    r"""Train a byte-pair vocabulary with Gemma's special ids and Gemma's settings on some texts.

    As in Gemma: text is not normalised, whitespace is kept, digits stand alone, bytes are the fallback for
    characters outside the vocabulary, so every string is read back unchanged. The same texts in the same order give
    the same vocabulary.

    Args:
        texts: iterable of strings.
        vocabulary_size: V, pieces in all. The fixed ones (special, newlines, bytes) take 395; the characters of the
            texts come on top, then merges.
        path: file to write the model to as well, or `None`.

    Returns:
        The serialized SentencePiece model, as bytes: `T5GemmaTokenizer(proto=...)` takes it, and as a file named
        `tokenizer.model` so does Hugging Face.

    Raises:
        ValueError: where a text is no string, there is no text at all, or the texts cannot fill that vocabulary or
            need a larger one; then nothing is written.
    """
    import sentencepiece

    lines = list(_lines(texts))
    if not lines:
        raise ValueError("`texts` holds nothing to train on: every text is empty or there is none.")
    model = io.BytesIO()
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
            # The trainer drops longer lines without a word; its default is 4,192 bytes, the least it takes 10.
            max_sentence_length=max(10, *(len(line.encode()) for line in lines)),
            minloglevel=2,
            **{f"{name}_id": token_id for name, token_id in _CONTROL.items()},
            **{f"{name}_piece": f"<{name}>" for name in _CONTROL},
        )
    except RuntimeError as error:
        raise ValueError(f"Cannot train with vocabulary_size={vocabulary_size!r} on these texts: {error}") from error
    if path is not None:
        _write_whole(Path(path), model.getvalue())
    return model.getvalue()


def _lines(texts):
    """The texts' non-empty lines: newlines are pieces of their own, so nothing is learned across them."""
    if isinstance(texts, (str, bytes)):
        raise ValueError("`texts` must be an iterable of strings. Received a single one: wrap it in a list.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`texts` must hold strings. Received: texts[{index}]={text!r}.")
        yield from (line for line in text.split("\n") if line)


def _write_whole(path, content):
    """Write beside the file first, so that a failed write leaves nothing half-written under its name."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
