"""A source's rows: the texts in them, and streams of them that are shared out and can save their position."""

import importlib
from collections.abc import Mapping

import grain


def text_of(row, field, place):
    """The text of a row: itself where it is a string, else what stands in its field.

    Args:
        row: a string, or a mapping.
        field: the field's name; `None` for the row as it is.
        place: where the row comes from, for the message.

    Raises:
        ValueError: where the row has no such field, or no string in it.
    """
    if field is None or isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} must be a string or have fields. Received: {row!r:.80}.")
    if field not in row:
        raise ValueError(f"{place} has no field {field!r}. It has: {', '.join(map(str, row)) or 'none'}.")
    if not isinstance(row[field], str):
        raise ValueError(f"The field {field!r} of {place} must be a string. Received: {row[field]!r:.80}.")
    return row[field]


def optional_module(name, needed_for):
    """A module of the extra `data`.

    Raises:
        ImportError: where it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{needed_for} needs `{package}`, which is not installed: pip install 'keras-t5gemma[data]'."
        ) from error


class RowStream(grain.IterDataset):
    """Rows in an order of their own, which processes and workers share out by the rows' numbers.

        rows                         0 1 2 3 4 5 6 7
        process 0 of 2               0   2   4   6
        its worker 1 of 2                2       6

    Workers that take turns thus give the rows in the order in which one process has them, whatever their number. A
    subclass makes iterators that are `RowIterator`s.
    """

    def __init__(self, shard_index=0, shard_count=1):
        super().__init__()
        self.shard = shard_index, shard_count
        self.worker = 0, 1

    def set_slice(self, sl, sequential_slice=False):
        """Makes this the rows of one of Grain's workers; Grain calls it, in the worker, more than once."""
        if sequential_slice:
            raise ValueError("A stream has no length, and so no sequential slices: use `sequential_slice=False`.")
        self.worker = sl.start, sl.step

    def has(self, number):
        """Whether a row is among the process's and the worker's."""
        share, mine = divmod(number, self.shard[1])
        return mine == self.shard[0] and share % self.worker[1] == self.worker[0]


class RowIterator(grain.DatasetIterator):
    """Goes through a `RowStream`'s rows.

    A subclass has `next_row`, which returns a function that makes the next row or raises StopIteration (the function
    is called only where the row is wanted), and `get_position` and `set_position`.
    """

    def __init__(self, rows):
        super().__init__()
        self.rows = rows
        self.number = 0

    def __next__(self):
        while True:
            make = self.next_row()
            self.number += 1
            if self.rows.has(self.number - 1):
                return make()

    def get_state(self):
        """The row's number, and where the subclass finds it."""
        return {"number": self.number, **self.get_position()}

    def set_state(self, state):
        """Goes on from a state."""
        self.number = state["number"]
        self.set_position(state)
