"""Rows in memory as a dataset of batches in an order that follows from a seed and the epoch."""

import grain
import keras
import numpy as np

from keras_t5gemma.checks import integer

_Y, _WEIGHT = "y", "sample_weight"


def batches_of_rows(x, y=None, sample_weight=None, *, batch_size, seed):
    """What lies in memory as a dataset with random access.

    Args:
        x: a mapping of arrays or lists of B rows: texts, conversations or token ids.
        y: labels, B rows, or None.
        sample_weight: likewise.
        batch_size: rows a batch; the last one of an epoch may have fewer.
        seed: of the order, another one in each epoch; None for the order that the rows have.

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
            {name: _taken(column, list(rows)) for name, column in group.items()} for group in (columns, targets)
        )
        return keras.utils.pack_x_y_sample_weight(part, rest.get(_Y), rest.get(_WEIGHT))

    rows = grain.MapDataset.range(next(iter(counts.values())))
    return (rows if seed is None else rows.shuffle(seed=seed)).batch(batch_size, batch_fn=batch)


def _column(values):
    """Lists stay lists: their rows may be texts, or of unequal length."""
    return list(values) if isinstance(values, (list, tuple)) else np.asarray(values)


def _taken(column, rows):
    return [column[row] for row in rows] if isinstance(column, list) else column[rows]
