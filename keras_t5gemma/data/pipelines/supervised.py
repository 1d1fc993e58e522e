"""Questions with their answers, and chats, to batches with loss on the answers only."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np

from keras_t5gemma.checks import integer
from keras_t5gemma.data.objectives.example import Example, SpecialIds
from keras_t5gemma.data.pipelines.streams import batches, in_order
from keras_t5gemma.suggestions import check_choice

MESSAGES = "messages"
_ANSWERING_ROLES = ("assistant", "model")


def supervised_dataset(
    pairs: Iterable,
    preprocessor: Callable,
    *,
    batch_size: int,
    encoder_length: int | None = None,
    decoder_length: int | None = None,
    fields: Sequence[str] = ("encoder_text", "decoder_text"),
    answers: str = "last",
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    pack: bool = False,
    num_workers: int = 0,
    shuffle_buffer: int = 10_000,
    pack_buffer: int = 1_024,
    drop_remainder: bool = False,
) -> grain.IterDataset:
    """Makes batches of (input, target) pairs or chats for `fit`.

    The encoder reads the input and the decoder learns the target. Only the target and its closing tokens have weight.
    A chat is a pair too: the encoder reads its turns up to an answer of the model.

        chat                                            encoder                         labels
        user: Knock knock.  assistant: Who's there?     user: Knock knock.              Who's there?
        user: Gemma.        assistant: Gemma who?       user: Knock knock. [...] Gemma. Gemma who?

    >>> data = supervised_dataset(text_source("chats.jsonl", field=None), lm.preprocessor, batch_size=8, pack=True)
    >>> lm.fit(data, steps_per_epoch=1000)

    Rows are ordered, shuffled, shared among workers and packed as in `pretraining_dataset`, and the position can be
    saved in the same way.

    Args:
        pairs: rows, as a list or another iterable, a dict of columns, or a Grain dataset (`text_source(...,
            field=None)`). A row is `(input, target)`; or has two `fields`; or is a conversation, a list of `{"role":
            ..., "content": ...}`, or has one in its field "messages".
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`, which formats inputs as turns with `chat=True`, closes targets,
            and cuts long texts if it has `truncate`. Or a tokenizer, a function of a string that returns ids, for pairs
            of plain texts.
        batch_size: B.
        encoder_length: S; by default the preprocessor's `encoder_sequence_length`.
        decoder_length: T; by default the preprocessor's `decoder_sequence_length`.
        fields: the names of input and target in rows that have fields.
        answers: the answers of a conversation to learn: the "last" one, or "all", with one example per answer.
        seed: seed of the order.
        shuffle: whether rows come in a random order, which differs between epochs.
        num_epochs: number of passes over the rows; `None` for endless data, which needs `steps_per_epoch` in `fit`.
        pack: whether as many examples share a row as fit.
        num_workers: processes that read and tokenize, as in `pretraining_dataset`; 0 to use only this process.
        shuffle_buffer: number of rows that are shuffled together if a Grain dataset has no random access.
        pack_buffer: number of examples that are packed together.
        drop_remainder: whether a last, smaller batch is left out, as in `pretraining_dataset`.

    Returns:
        A `grain.IterDataset` of `(x, y, sample_weight)`, see `pretraining_dataset`.

    Raises:
        ValueError: if an argument is out of range or there are no rows; and while the dataset is read, if a row has
            another form or is too long.
    """
    batch_size = integer(batch_size, "batch_size")
    seed = integer(seed, "seed", least=0)
    num_epochs = integer(num_epochs, "num_epochs", optional=True)
    check_choice(answers, "answers", ("last", "all"))
    is_preprocessor = hasattr(preprocessor, "encoder_sequence_length")
    tokenizer: Any = preprocessor
    if is_preprocessor:
        tokenizer = preprocessor.tokenizer
        encoder_length = preprocessor.encoder_sequence_length if encoder_length is None else encoder_length
        decoder_length = preprocessor.decoder_sequence_length if decoder_length is None else decoder_length
    lengths = integer(encoder_length, "encoder_length"), integer(decoder_length, "decoder_length")
    encode = partial(_preprocessed if is_preprocessor else _tokenized, preprocessor, lengths)
    example_lists = in_order(
        _rows(pairs),
        partial(_examples, encode=encode, fields=tuple(fields), answers=answers),
        seed=seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
        shuffle_buffer=shuffle_buffer,
        num_workers=num_workers,
    )
    return batches(
        grain.experimental.FlatMapIterDataset(example_lists, _Flatten()),
        lengths,
        SpecialIds.of(tokenizer),
        batch_size=batch_size,
        seed=seed,
        pack=pack,
        pack_buffer=pack_buffer,
        drop_remainder=drop_remainder,
    )


class _Flatten(grain.experimental.FlatMapTransform):
    def flat_map(self, element: list[Example]) -> list[Example]:
        return element


def _rows(pairs: Iterable) -> grain.MapDataset | grain.IterDataset:
    """The rows of `pairs`, in any of its forms, as a Grain dataset."""
    if isinstance(pairs, (grain.MapDataset, grain.IterDataset)):
        return pairs
    if isinstance(pairs, Mapping):
        columns = {name: list(column) for name, column in pairs.items()}
        if len({len(column) for column in columns.values()}) > 1:
            counts = {name: len(column) for name, column in columns.items()}
            raise ValueError(f"The columns of `pairs` must have the same number of rows. Received: {counts}.")
        pairs = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(pairs, (str, bytes)):
        raise ValueError(
            f"`pairs` must hold rows, not be a string. To read files, pass `text_source({pairs!r:.80}, field=None)`."
        )
    return grain.MapDataset.source(list(pairs))


def _examples(row: Any, *, encode: Callable[..., Example], fields: tuple[str, ...], answers: str) -> list[Example]:
    """The `Example`s of a row. An error message shows the row."""
    try:
        return [encode(prompt, answer) for prompt, answer in _pairs(row, fields, answers)]
    except ValueError as error:
        raise ValueError(f"{error} The row: {row!r:.200}") from error


def _pairs(row: Any, fields: tuple[str, ...], answers: str) -> list[tuple]:
    """The question and answer pairs of a row. A chat has one pair per answer."""
    if isinstance(row, Mapping):
        if MESSAGES in row:
            return _turns(row[MESSAGES], answers)
        if missing := [name for name in fields if name not in row]:
            raise ValueError(
                f"A row of `pairs` lacks {' and '.join(map(repr, missing))}; it has {', '.join(map(str, row))}. Pass "
                f"`fields`, the names of input and target."
            )
        return [tuple(row[name] for name in fields)]
    if isinstance(row, (list, tuple)) and row and all(isinstance(message, Mapping) for message in row):
        return _turns(row, answers)
    if isinstance(row, (list, tuple)) and len(row) == 2:
        return [tuple(row)]
    raise ValueError("A row of `pairs` must be (input, target), have fields, or be a conversation.")


def _turns(messages: Iterable[Mapping], answers: str) -> list[tuple]:
    """Pairs of (messages before an answer, answer): for the last answer of a conversation, or for all."""
    messages = list(messages)
    ends = [i for i, message in enumerate(messages) if message.get("role") in _ANSWERING_ROLES]
    if not ends or ends[0] == 0 or ends[-1] != len(messages) - 1:
        raise ValueError(
            "A conversation of `pairs` must start with the user and end with an answer of the assistant's."
        )
    return [(messages[:end], messages[end]["content"]) for end in (ends if answers == "all" else ends[-1:])]


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
