"""Prompts with a chosen and a rejected answer to batches, two decoder rows per prompt."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np

from keras_t5gemma.checks import arguments_named, integer
from keras_t5gemma.data.objectives.example import Example, SpecialIds, model_arrays
from keras_t5gemma.data.pipelines.pairs import ANSWERING_ROLES, PairEncoding, pair_encoding, rows_of
from keras_t5gemma.data.pipelines.streams import in_order
from keras_t5gemma.data.pipelines.teacher_view import LABELS

# Names in the y of batches: whether an unpaired answer is desirable; the reference's log-probabilities.
DESIRABLE, REFERENCE = "desirable", "reference_log_probs"
# TRL's names of columns.
_PROMPT, _CHOSEN, _REJECTED, _COMPLETION, _LABEL = "prompt", "chosen", "rejected", "completion", "label"
# Marks a position without a label, as in `keras_t5gemma.training.losses.labels`.
_IGNORED = -100


def preference_dataset(
    rows: Iterable,
    preprocessor: Callable,
    *,
    batch_size: int,
    encoder_length: int | None = None,
    decoder_length: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    num_workers: int = 0,
    shuffle_buffer: int = 10_000,
    drop_remainder: bool = False,
) -> grain.IterDataset:
    """Makes batches of preferences for a model compiled with `PreferenceLoss`.

    Rows have the columns of TRL, as texts or as chats, lists of `{"role": ..., "content": ...}`:

        explicit    {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}
        implicit    {"chosen": [user, assistant], "rejected": [user, assistant]}     whole chats that begin alike
        unpaired    {"prompt": "2 + 2 =", "completion": "4", "label": True}          for `PreferenceLoss("kto")`

    >>> data = kt.preference_dataset(kt.text_source("pairs.jsonl", field=None), lm.preprocessor, batch_size=8)

    The encoder reads each prompt once; the decoder has a row per answer, the chosen one first. Labels are an answer's
    tokens and what closes it. An answer that the preprocessor's `truncate` cuts on the right is not closed. The prompt
    of an implicit row is what both answers begin with: whole messages of chats, characters of texts, as in TRL.

    The second decoder row of an unpaired row is the answer to another prompt, half the rows away, for KTO's estimate of
    the divergence. It does not depend on the batch, so that a reference can be computed beforehand. Unpaired rows
    without random access are read into memory.

    Rows are ordered, shuffled and shared among workers as in `pretraining_dataset`, and the position can be saved in
    the same way.

    Args:
        rows: a list or another iterable, a dict of columns, or a Grain dataset (`text_source(..., field=None)`). Other
            columns are not read.
        preprocessor: as for `supervised_dataset`.
        batch_size: B, prompts per batch.
        encoder_length: S; by default the preprocessor's `encoder_sequence_length`.
        decoder_length: T; by default the preprocessor's `decoder_sequence_length`.
        seed: seed of the order.
        shuffle: whether rows come in a random order, which differs between epochs.
        num_epochs: number of passes over the rows; `None` for endless data, which needs `steps_per_epoch` in `fit`.
        num_workers: processes that read and tokenize, as in `pretraining_dataset`; 0 to use only this process.
        shuffle_buffer: number of rows that are shuffled together if a Grain dataset has no random access.
        drop_remainder: whether a last, smaller batch is left out, as in `pretraining_dataset`.

    Returns:
        A `grain.IterDataset` of `(x, y, sample_weight)`: x, a dict of `encoder_token_ids` and `encoder_padding_mask`
        [B, S], `decoder_token_ids` and `decoder_padding_mask` [B, 2, T]; y, a dict of `labels` [B, 2, T], -100 at
        padding, and for unpaired rows `desirable` [B]; all int32; weights [B], float32, all 1.

    Raises:
        ValueError: if an argument is out of range or there are no rows; and while the dataset is read, if a row has
            another form or is too long, or if both answers of a row are the same.
    """
    batch_size = integer(batch_size, "batch_size")
    seed = integer(seed, "seed", least=0)
    num_epochs = integer(num_epochs, "num_epochs", optional=True)
    encoding = pair_encoding(preprocessor, encoder_length, decoder_length)
    dataset = rows_of(rows, "rows")
    if _is_unpaired(_first(dataset)):
        dataset = _with_mismatched_answers(dataset)
    arrays = in_order(
        dataset,
        partial(_arrays, encoding=encoding),
        seed=seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
        shuffle_buffer=shuffle_buffer,
        num_workers=num_workers,
    )
    return arrays.batch(batch_size, drop_remainder=drop_remainder)


def _first(dataset: grain.MapDataset | grain.IterDataset) -> Any:
    """The first row, or None."""
    if isinstance(dataset, grain.MapDataset):
        return dataset[0] if len(dataset) else None
    return next(iter(dataset), None)


def _is_unpaired(row: Any) -> bool:
    return isinstance(row, Mapping) and _COMPLETION in row and _CHOSEN not in row


def _with_mismatched_answers(rows: grain.MapDataset | grain.IterDataset) -> grain.MapDataset:
    """Unpaired rows, each with the answer to another prompt."""
    if not isinstance(rows, grain.MapDataset):
        rows = grain.MapDataset.source(list(rows))
    return grain.MapDataset.range(len(rows)).map(_Mismatched(rows))


class _Unpaired(NamedTuple):
    """An unpaired row, and the answer to another prompt."""

    row: Any
    mismatched: Any


class _Mismatched:
    """The answer to another prompt for each unpaired row."""

    def __init__(self, rows: grain.MapDataset):
        self.rows = rows

    def __call__(self, index: int) -> _Unpaired:
        """The row with an index, and the answer."""
        row, count = self.rows[index], len(self.rows)
        prompt = _value(row, _PROMPT)
        # Rows nearby may well have the same prompt.
        for distance in range(count // 2, count // 2 + count):
            other = self.rows[(index + distance) % count]
            if _value(other, _PROMPT) != prompt:
                return _Unpaired(row, _value(other, _COMPLETION))
        raise ValueError(f"All {count} rows have the same prompt: KTO compares with answers to another. {_shown(row)}")


def _arrays(row: Any, *, encoding: PairEncoding) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """The arrays of a row. An error message shows the row."""
    try:
        return _unpaired(*row, encoding) if isinstance(row, _Unpaired) else _paired(row, encoding)
    except ValueError as error:
        raise ValueError(f"{error} {_shown(row.row if isinstance(row, _Unpaired) else row)}") from error


def _paired(row: Any, encoding: PairEncoding) -> tuple:
    """The arrays of a row with a chosen and a rejected answer."""
    prompt, *answers = _prompt_and_answers(row)
    chosen = _encoded(encoding, prompt, answers[0], _CHOSEN)
    rejected = _encoded(encoding, prompt, answers[1], _REJECTED)
    if np.array_equal(chosen.targets, rejected.targets):
        cut = " once both are cut to decoder_length" if _answer_text(answers[0]) != _answer_text(answers[1]) else ""
        raise ValueError(f"`chosen` and `rejected` are the same{cut}: there is no preference to learn.")
    return _stacked([chosen, rejected], encoding)


def _unpaired(row: Mapping, mismatched: Any, encoding: PairEncoding) -> tuple:
    """The arrays of a row with one answer and whether it is desirable, and of a mismatched answer."""
    prompt, label = _value(row, _PROMPT), _value(row, _LABEL)
    if not isinstance(label, (bool, np.bool_, int, np.integer)) or int(label) not in (0, 1):
        raise ValueError(f"`label` must be true for a desirable completion, else false. Received: {label!r}.")
    answers = _value(row, _COMPLETION), mismatched
    x, y, weight = _stacked([_encoded(encoding, prompt, answer, _COMPLETION) for answer in answers], encoding)
    return x, {**y, DESIRABLE: np.int32(label)}, weight


def _encoded(encoding: PairEncoding, prompt: Any, answer: Any, column: str) -> Example:
    """A prompt and an answer from a column, whose names errors have."""
    with arguments_named({"encoder_text": _PROMPT, "decoder_text": column}):
        return encoding.encode(prompt, _answer_text(answer))


def _stacked(examples: Sequence[Example], encoding: PairEncoding) -> tuple:
    """`(x, y, weight)` of the answers to one prompt."""
    special: SpecialIds = encoding.special
    inputs, labels, weights = zip(
        *(model_arrays(example, *encoding.lengths, special) for example in examples), strict=True
    )
    x = {name: inputs[0][name] for name in ("encoder_token_ids", "encoder_padding_mask")}
    x |= {name: np.stack([row[name] for row in inputs]) for name in ("decoder_token_ids", "decoder_padding_mask")}
    y = {LABELS: np.where(np.stack(weights) > 0, np.stack(labels), _IGNORED).astype("int32")}
    return x, y, np.float32(1)


def _prompt_and_answers(row: Any) -> tuple[Any, Any, Any]:
    """`(prompt, chosen, rejected)` of an explicit or an implicit row."""
    chosen, rejected = _value(row, _CHOSEN), _value(row, _REJECTED)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("`chosen` and `rejected` must both be texts, or both be messages.")
    prompt = row.get(_PROMPT)
    # Some sets have whole chats beside a prompt that is a text. TRL takes the chats, too.
    if prompt is not None and (not isinstance(prompt, str) or isinstance(chosen, str) or len(chosen) == 1):
        return prompt, chosen, rejected
    if isinstance(chosen, str):
        length = _common_length(chosen, rejected)
        length -= chosen[:length].endswith(" ")
    else:
        chosen, rejected = list(chosen), list(rejected)
        length = _common_length(chosen, rejected)
    if chosen == rejected:
        raise ValueError("`chosen` and `rejected` are the same: there is no preference to learn.")
    if not length:
        raise ValueError("The row has no `prompt`, and `chosen` and `rejected` have no common beginning to be one.")
    return chosen[:length], chosen[length:], rejected[length:]


def _common_length(a: Sequence, b: Sequence) -> int:
    """The number of equal items, or characters, at the start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(a), len(b)))


def _answer_text(answer: Any) -> str:
    """The text of an answer: a text, or messages of which the only one is the assistant's."""
    if isinstance(answer, str):
        return answer
    messages = list(answer) if isinstance(answer, (list, tuple, np.ndarray)) else []
    if len(messages) != 1 or not isinstance(messages[0], Mapping) or messages[0].get("role") not in ANSWERING_ROLES:
        raise ValueError(
            f"An answer must be a text, or a list with one message of the assistant, which follows what both answers "
            f"have in common. Received: {answer!r:.80}."
        )
    return messages[0]["content"]


def _value(row: Any, name: str) -> Any:
    """A column of a row."""
    if not isinstance(row, Mapping) or row.get(name) is None:
        has = f"it has {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"it is a {type(row).__name__}"
        has = "it is None" if isinstance(row, Mapping) and name in row else has
        raise ValueError(
            f"A row of `rows` lacks {name!r}; {has}. Rows are dicts of prompt, chosen and rejected; of chosen and "
            f"rejected; or of prompt, completion and label."
        )
    return row[name]


def _shown(row: Any) -> str:
    return f"The row: {row!r:.200}"
