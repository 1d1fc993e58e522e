"""Pairs of a prompt and an answer: rows in any form, and their ids."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import grain
import numpy as np

from keras_t5gemma.checks import integer
from keras_t5gemma.data.objectives.example import Example, SpecialIds

# The roles of a conversation's messages that are the model's.
ANSWERING_ROLES = ("assistant", "model")


@dataclasses.dataclass(frozen=True)
class PairEncoding:
    """Encodes pairs.

    Attributes:
        encode: `(prompt, answer) -> Example`.
        lengths: `(S, T)`.
        special: a `SpecialIds`.
    """

    encode: Callable[..., Example]
    lengths: tuple[int, int]
    special: SpecialIds


def pair_encoding(preprocessor: Any, encoder_length: int | None, decoder_length: int | None) -> PairEncoding:
    """How a preprocessor or a tokenizer encodes pairs.

    Args:
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`, or a function of a string that returns ids.
        encoder_length: S; by default the preprocessor's `encoder_sequence_length`.
        decoder_length: T; by default the preprocessor's `decoder_sequence_length`.

    Returns:
        A `PairEncoding`.

    Raises:
        ValueError: if a length is missing or out of range.
    """
    is_preprocessor = hasattr(preprocessor, "encoder_sequence_length")
    tokenizer = preprocessor
    if is_preprocessor:
        tokenizer = preprocessor.tokenizer
        encoder_length = preprocessor.encoder_sequence_length if encoder_length is None else encoder_length
        decoder_length = preprocessor.decoder_sequence_length if decoder_length is None else decoder_length
    lengths = integer(encoder_length, "encoder_length"), integer(decoder_length, "decoder_length")
    encode = partial(_preprocessed if is_preprocessor else _tokenized, preprocessor, lengths)
    return PairEncoding(encode, lengths, SpecialIds.of(tokenizer))


def rows_of(rows: Iterable, name: str) -> grain.MapDataset | grain.IterDataset:
    """Rows in any form as a Grain dataset.

    Args:
        rows: a Grain dataset of rows, a dict of columns, or an iterable of rows.
        name: the argument's name, for errors.

    Returns:
        A Grain dataset.

    Raises:
        ValueError: if columns differ in their number of rows, or `rows` is a string.
    """
    if isinstance(rows, (grain.MapDataset, grain.IterDataset)):
        return rows
    if isinstance(rows, Mapping):
        columns = {name: list(column) for name, column in rows.items()}
        if len({len(column) for column in columns.values()}) > 1:
            counts = {name: len(column) for name, column in columns.items()}
            raise ValueError(f"The columns of `{name}` must have the same number of rows. Received: {counts}.")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(rows, (str, bytes)):
        raise ValueError(
            f"`{name}` must hold rows, not be a string. To read files, pass `text_source({rows!r:.80}, field=None)`."
        )
    return grain.MapDataset.source(list(rows))


def _preprocessed(preprocessor: Any, lengths: tuple[int, int], prompt: Any, answer: str) -> Example:
    """A pair as an `Example`, by a preprocessor.

    Args:
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`.
        lengths: `(S, T)`.
        prompt: a text, or a conversation.
        answer: a text.

    Returns:
        An `Example`.
    """
    x, y, sample_weight = preprocessor.call(
        {"encoder_text": prompt, "decoder_text": answer},
        encoder_sequence_length=lengths[0],
        decoder_sequence_length=lengths[1],
    )
    inputs = x["encoder_token_ids"][x["encoder_padding_mask"] > 0]
    # The preprocessor has closed the target already, unless it was cut.
    return Example(inputs, y[sample_weight > 0], complete=False)


def _tokenized(tokenizer: Callable, lengths: tuple[int, int], prompt: str, answer: str) -> Example:
    """A pair of texts as an `Example`, by a tokenizer.

    Args:
        tokenizer: a function of a string that returns ids.
        lengths: `(S, T)`.
        prompt: a text.
        answer: a text.

    Returns:
        An `Example`.

    Raises:
        ValueError: if a value is not a text, the prompt is empty, or a text is too long.
    """
    for name, text in (("input", prompt), ("target", answer)):
        if not isinstance(text, str):
            raise ValueError(
                f"The {name} must be a string if `preprocessor` is a tokenizer. Received: {text!r:.80}. Conversations "
                f"need a preprocessor with `chat=True`."
            )
    inputs, targets = (np.asarray(tokenizer(text), "int32") for text in (prompt, answer))
    if not len(inputs):
        raise ValueError("The input is empty: the encoder needs at least one token.")
    if len(inputs) > lengths[0] or len(targets) + 1 > lengths[1]:
        raise ValueError(
            f"The input takes {len(inputs)} tokens and the target {len(targets) + 1}, <eos> included; they must fit "
            f"encoder_length={lengths[0]} and decoder_length={lengths[1]}. Raise them, or pass a preprocessor with "
            f"`truncate`."
        )
    return Example(inputs, targets, complete=True)
