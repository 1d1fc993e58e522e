"""Pairs of texts, queries and documents, to arrays: the data that embedders are trained with."""

import dataclasses
import random
import sys
from collections.abc import Callable, Iterable, Mapping

import grain
import numpy as np

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checks import check_finite
from keras_t5gemma.training.batches.arrays import described, to_numpy
from keras_t5gemma.training.batches.rows import training_batches
from keras_t5gemma.training.batches.sources import Batches, BatchSource, Reopened, never_ends
from keras_t5gemma.training.batches.streams import dataset_of_any_width

QUERY, DOCUMENT, NEGATIVE = "query", "document", "negative"
FORM = (
    'A batch must hold as many documents as queries: {"query": [...], "document": [...]}, and for hard negatives '
    '"negative", or "negative_1", "negative_2", ..., each a list of texts or, for a model without preprocessor, of '
    "rows of token ids; or a tuple of these lists in this order."
)
# The smallest length of a batch. Others are its doubles, so that few programs are compiled; as in `Buckets`.
_LENGTH = 16


def columns_of(x) -> dict:
    """A batch of pairs as a dict: `query`, `document`, and the hard negatives if there are any.

    Raises:
        ValueError: if x is not a mapping of these names, or a tuple or list of two or more columns.
    """
    if isinstance(x, (tuple, list)) and len(x) > 1 and not isinstance(x[0], (str, bytes)):
        more = [NEGATIVE] if len(x) == 3 else [f"{NEGATIVE}_{i}" for i in range(1, len(x) - 1)]
        x = dict(zip([QUERY, DOCUMENT, *more], x, strict=True))
    if not isinstance(x, Mapping) or not {QUERY, DOCUMENT} <= set(x) or not all(map(_is_column, x)):
        raise ValueError(f"{FORM} Received: {described(x)}.")
    return {name: x[name] for name in column_names(x)}


def column_names(x: Mapping) -> list[str]:
    """The names of a batch's columns in their order, which JAX does not keep."""
    return [QUERY, DOCUMENT, *sorted(set(x) - {QUERY, DOCUMENT})]


def unpacked_pairs(batch) -> tuple:
    """`(x, y, sample_weight)` of a batch: columns, (columns,), (columns, None, weights), or of `PairArrays`."""
    parts = (batch,)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Mapping):
        parts = tuple(batch)
    if len(parts) == 3 and is_converted(parts[0]):
        return parts
    if len(parts) > 3 or (len(parts) > 1 and parts[1] is not None):
        raise ValueError(f"{FORM} Weights come third: (x, None, sample_weight). Received: {described(batch)}.")
    return (columns_of(parts[0]), None, parts[2] if len(parts) == 3 else None)


def pair_source(
    data,
    y=None,
    sample_weight=None,
    *,
    batch_size: int | None = None,
    shuffle: bool = False,
    steps_name: str = "steps",
) -> "PairSource":
    """A user's pairs as a `BatchSource`, whose arguments these are.

    Raises:
        ValueError: as for `BatchSource`.
    """
    if y is not None:
        raise ValueError(f"`y` must be None: which document belongs to a query is in x. {FORM}")
    options = {"steps_name": steps_name}
    if isinstance(data, (Mapping, tuple)):
        rows = training_batches(columns_of(data), None, sample_weight, batch_size=batch_size, shuffle=shuffle)
        return PairSource(rows, **options)
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.Dataset):
        _check_left_out(data, sample_weight=sample_weight)
        rows = grain.MapDataset.range(len(data))
        if shuffle:
            rows = rows.shuffle(seed=random.getrandbits(31))
        names = [name for name in data.column_names if _is_column(name)]
        selected = data.select_columns(names)
        columns_of(dict.fromkeys(names))
        return PairSource(rows.batch(batch_size or 32).map(lambda i: selected[np.asarray(i).tolist()]), **options)
    if datasets is not None and isinstance(data, datasets.IterableDataset):
        _check_left_out(data, sample_weight=sample_weight)
        return PairSource(Reopened(lambda: map(_without_others, data.iter(batch_size or 32))), **options)
    if isinstance(data, list):
        raise ValueError(f"x is a list. Make columns of a list of pairs: `tuple(zip(*pairs))`. {FORM}")
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)) or hasattr(data, "shape"):
        raise ValueError(f"{FORM} Or a dataset or generator of such batches. Received: {described(data)}.")
    _check_left_out(data, sample_weight=sample_weight, batch_size=batch_size)
    if hasattr(data, "as_numpy_iterator"):  # a `tf.data.Dataset`, whose texts are read as Python's
        return PairSource(Reopened(data.as_numpy_iterator, endless=never_ends(data)), **options)
    return PairSource(data, shuffle=shuffle, **options)


class PairSource(BatchSource):
    """A `BatchSource` whose batches are pairs."""

    def batches(self, to_arrays: Callable, *, steps: int | None = None, passes: int = 1) -> Batches:
        """As of `BatchSource`."""
        batches = super().batches(to_arrays, steps=steps, passes=passes, unpack=unpacked_pairs)
        if not isinstance(self.data, (grain.MapDataset, grain.IterDataset)):
            return batches
        return dataclasses.replace(batches, dataset=dataset_of_any_width(batches.dataset))


class PairArrays:
    """Converts a batch of pairs to the model's arrays.

        x   query     ["a b", "c"]        query     token_ids  5 6   7 0      y  0 1    numbers of texts
            document  ["d", "e f g"]                mask       1 1   1 0         2 3
                                          document  token_ids  8 0 0   9 10 11    (weights 1 1)
                                                    mask       1 0 0   1 1 1

    Each column is padded to its longest text, rounded up to 16, 32, 64, ... tokens, but not above `limit`.

    Args:
        encode: `(texts, name) -> rows of ids`.
        limit: the largest length, or None.
        multiple: the number of rows is rounded up to a multiple of this, by rows of weight 0 that are no candidates;
            for batches that are sharded over devices.
    """

    def __init__(self, encode: Callable, limit: int | None = None, multiple: int = 1):
        self.encode, self.limit, self.multiple = encode, limit, multiple
        self._is_first = True

    def __call__(self, x, y=None, sample_weight=None) -> tuple:
        """Converts one batch.

        Args:
            x: columns of B texts, as for `columns_of`.
            y: None; or, if x has been converted already, its numbers of texts.
            sample_weight: [B], or None for equal weights.

        Returns:
            `(x, y, sample_weight)`: a dict of `{"token_ids": [B, S], "padding_mask": [B, S]}` by column, int32; numbers
            of texts [B, C], int32, equal for equal texts, -1 in rows that are no candidates; weights [B], float32.

        Raises:
            ValueError: if a column is missing, columns differ in length, or a text is empty or too long.
        """
        if is_converted(x):
            return x, y, sample_weight
        if y is not None:
            raise ValueError(f"`y` must be None: which document belongs to a query is in x. {FORM}")
        columns = {name: self.encode(_listed(column, name), name) for name, column in columns_of(x).items()}
        sizes = {name: len(rows) for name, rows in columns.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"All columns need the same number of rows. Received: {sizes}.")
        count = sizes[QUERY]
        weights = np.ones(count, "float32") if sample_weight is None else np.asarray(to_numpy(sample_weight), "float32")
        if weights.shape != (count,):
            raise ValueError(f"`sample_weight` must hold one weight per row, ({count},). Received: {weights.shape}.")
        check_finite(weights)
        seen = {}
        numbers = [[seen.setdefault(tuple(row), len(seen)) for row in rows] for rows in columns.values()]
        numbers = np.array(numbers, "int32").T
        if self._is_first:  # a last batch may well be a single pair
            self._is_first = False
            _warn_of_no_negatives(numbers)
        added = -count % self.multiple
        columns = {name: [*rows, *rows[-1:] * added] for name, rows in columns.items()}
        numbers = np.pad(numbers, ((0, added), (0, 0)), constant_values=-1)
        return {name: self._padded(rows) for name, rows in columns.items()}, numbers, np.pad(weights, (0, added))

    def _padded(self, rows: list) -> dict[str, np.ndarray]:
        longest, length = max(map(len, rows)), _LENGTH
        while length < longest:
            length *= 2
        length = longest if self.limit is not None and self.limit < longest else min(length, self.limit or length)
        ids, mask = np.zeros((2, len(rows), length), "int32")
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return {"token_ids": ids, "padding_mask": mask}


def _warn_of_no_negatives(numbers: np.ndarray) -> None:
    """Warns if no query of a batch has a document other than its own; numbers of texts [B, C], as in `PairArrays`."""
    queries, candidates = numbers[:, 0], numbers[:, 1:]
    if len(np.unique(candidates)) == 1 or (candidates.shape[1] == 1 and len(np.unique(queries)) == 1):
        warn_caller(
            f"No query of the first batch, of {len(numbers)} pairs, has a document other than its own to be told from, "
            f"so the loss is 0 and nothing is learned. Pass a larger batch_size, other pairs, or hard negatives."
        )


def is_converted(x) -> bool:
    """Whether x is a batch that `PairArrays` made."""
    return isinstance(x, Mapping) and isinstance(x.get(QUERY), Mapping)


def _without_others(batch: Mapping) -> dict:
    return {name: column for name, column in batch.items() if _is_column(name)}


def _is_column(name) -> bool:
    return name in (QUERY, DOCUMENT, NEGATIVE) or str(name).startswith(f"{NEGATIVE}_")


def _listed(column, name: str) -> list:
    """A column as a list; bytes become texts."""
    if isinstance(column, (str, bytes)) or not hasattr(column, "__len__"):
        raise ValueError(f"`{name}` must hold one text per row. {FORM} Received: {column!r:.80}.")
    values = list(column) if isinstance(column, (list, tuple)) else np.asarray(to_numpy(column)).tolist()
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def _check_left_out(data, **arguments) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be left out: a {type(data).__name__} has its own. Received: {value!r:.80}."
            )
