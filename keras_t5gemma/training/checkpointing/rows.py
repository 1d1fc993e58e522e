"""Rows in memory as a dataset of batches, in an order determined by a seed and the epoch."""

from collections.abc import Mapping

import grain
import keras
import numpy as np

from keras_t5gemma.checks import integer

_Y, _WEIGHT = "y", "sample_weight"


def batches_of_rows(x: Mapping, y=None, sample_weight=None, *, batch_size: int, seed: int | None) -> grain.MapDataset:
    """Rows in memory as a dataset of batches with random access.

    Args:
        x: a mapping of arrays or lists of B rows: texts, conversations or token ids.
        y: labels, B rows, or None.
        sample_weight: weights, B rows, or None.
        batch_size: rows per batch; the last batch of an epoch may have fewer.
        seed: the seed of the order, which differs in each epoch; None for the given order of the rows.

    Returns:
        A `grain.MapDataset` of `x`, `(x, y)` or `(x, y, sample_weight)`.

    Raises:
        ValueError: if an argument is out of range, or the columns have no rows or differ in their number.
    """
    batch_size = integer(batch_size, "batch_size")
    seed = integer(seed, "seed", least=0, optional=True, none_means="for the order of the rows")
    columns = {name: _column(values) for name, values in x.items()}
    targets = {name: _column(values) for name, values in ((_Y, y), (_WEIGHT, sample_weight)) if values is not None}
    named = {f"x[{name!r}]": column for name, column in columns.items()} | targets
    counts = {
        name: 0 if isinstance(column, np.ndarray) and not column.ndim else len(column) for name, column in named.items()
    }
    if len(set(counts.values())) != 1 or not all(counts.values()):
        raise ValueError(f"All columns must have the same number of rows, at least one. Received: {counts}.")

    def batch(rows):
        part, rest = (
            {name: _select(column, list(rows)) for name, column in group.items()} for group in (columns, targets)
        )
        return keras.utils.pack_x_y_sample_weight(part, rest.get(_Y), rest.get(_WEIGHT))

    rows = grain.MapDataset.range(next(iter(counts.values())))
    return (rows if seed is None else rows.shuffle(seed=seed)).batch(batch_size, batch_fn=batch)


def _column(values) -> list | np.ndarray:
    """A column as an array; a list stays a list, because its rows may be texts or of unequal length."""
    return list(values) if isinstance(values, (list, tuple)) else np.asarray(values)


def _select(column: list | np.ndarray, rows: list[int]) -> list | np.ndarray:
    """The rows of a column at these indices."""
    return [column[row] for row in rows] if isinstance(column, list) else column[rows]
