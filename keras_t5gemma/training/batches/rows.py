"""Rows in memory: in batches, in another order each epoch, and split for validation."""

import random
from collections.abc import Mapping

import grain
import numpy as np


def training_batches(
    x: Mapping, y=None, sample_weight=None, *, batch_size: int | None = None, shuffle: bool = False
) -> grain.MapDataset:
    """Batches of rows in memory, for `fit`; optionally in another order each epoch.

    keras-hub batches rows too, but always in their given order, and it cannot batch conversations of unequal length.

    Args:
        x: a mapping of arrays or lists of B rows: token ids, strings or conversations.
        y: labels, an array of B rows, or None.
        sample_weight: weights, an array of B rows, or None.
        batch_size: rows per batch; 32 if None, as in Keras.
        shuffle: whether rows are shuffled, by `random`, which `keras.utils.set_random_seed` seeds too.

    Returns:
        A `grain.MapDataset` of `(x, y, sample_weight)`; columns that were arrays are arrays, and lists are lists.

    Raises:
        ValueError: if the columns have no rows or differ in their number.
    """
    columns = {**x, **{name: value for name, value in (("y", y), ("weight", sample_weight)) if value is not None}}
    for name, column in columns.items():
        if isinstance(column, (str, bytes)) or not hasattr(column, "__len__"):
            raise ValueError(f"`{name}` must hold one row per example: an array or a list. Received: {column!r:.80}.")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise ValueError(f"All columns need the same number of rows, at least one. Received: {lengths}.")
    stacked = {name for name, column in columns.items() if not isinstance(column, (list, tuple))}

    def batch(rows):
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns = {name: np.stack(column) if name in stacked else column for name, column in columns.items()}
        # Not by `keras.utils.pack_x_y_sample_weight`, which drops weights if there is no y, as with texts.
        return {name: columns[name] for name in x}, columns.get("y"), columns.get("weight")

    rows = grain.MapDataset.range(next(iter(lengths.values())))
    if shuffle:
        rows = rows.shuffle(seed=random.getrandbits(31))
    rows = rows.map(lambda i: {name: column[i] for name, column in columns.items()})
    return rows.batch(32 if batch_size is None else batch_size, batch_fn=batch)


def split_rows(x: Mapping, y, sample_weight, fraction: float) -> tuple[tuple, tuple]:
    """Splits rows into those for training and the last `fraction` of them for validation, as Keras does.

    Args:
        x: a mapping of columns with B rows.
        y: labels, B rows, or None.
        sample_weight: weights, B rows, or None.
        fraction: the part for validation.

    Returns:
        `(x, y, sample_weight)` twice.

    Raises:
        ValueError: if either part has no rows.
    """
    total = len(next(iter(x.values())))
    split = int(total * (1 - fraction))
    if not 0 < split < total:
        raise ValueError(
            f"`validation_split` leaves training or validation empty. Received: {fraction} of {total} rows."
        )

    def part(rows):
        columns = {name: column[rows] for name, column in x.items()}
        return columns, *(None if column is None else column[rows] for column in (y, sample_weight))

    return part(slice(split)), part(slice(split, None))
