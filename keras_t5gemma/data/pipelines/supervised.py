"""Questions with their answers, and chats, to batches with loss on the answers only."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import grain

from keras_t5gemma.checks import integer
from keras_t5gemma.data.objectives.example import Example
from keras_t5gemma.data.pipelines.pairs import ANSWERING_ROLES, pair_encoding, rows_of
from keras_t5gemma.data.pipelines.streams import batches, in_order
from keras_t5gemma.suggestions import check_choice

MESSAGES = "messages"


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
    encoding = pair_encoding(preprocessor, encoder_length, decoder_length)
    example_lists = in_order(
        rows_of(pairs, "pairs"),
        partial(_examples, encode=encoding.encode, fields=tuple(fields), answers=answers),
        seed=seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
        shuffle_buffer=shuffle_buffer,
        num_workers=num_workers,
    )
    return batches(
        grain.experimental.FlatMapIterDataset(example_lists, _Flatten()),
        encoding.lengths,
        encoding.special,
        batch_size=batch_size,
        seed=seed,
        pack=pack,
        pack_buffer=pack_buffer,
        drop_remainder=drop_remainder,
    )


class _Flatten(grain.experimental.FlatMapTransform):
    def flat_map(self, element: list[Example]) -> list[Example]:
        return element


def _examples(row: Any, *, encode: Callable[..., Example], fields: tuple[str, ...], answers: str) -> list[Example]:
    """The `Example`s of a row. An error message shows the row."""
    try:
        return [encode(prompt, answer) for prompt, answer in pairs_of_row(row, fields, answers)]
    except ValueError as error:
        raise ValueError(f"{error} The row: {row!r:.200}") from error


def pairs_of_row(row: Any, fields: Sequence[str], answers: str) -> list[tuple]:
    """The (question, answer) pairs of a row of `supervised_dataset`, whose arguments these are; a chat has some.

    Raises:
        ValueError: if the row has another form.
    """
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
    ends = [i for i, message in enumerate(messages) if message.get("role") in ANSWERING_ROLES]
    if not ends or ends[0] == 0 or ends[-1] != len(messages) - 1:
        raise ValueError(
            "A conversation of `pairs` must start with the user and end with an answer of the assistant's."
        )
    return [(messages[:end], messages[end]["content"]) for end in (ends if answers == "all" else ends[-1:])]
