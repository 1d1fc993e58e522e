"""Rows of a source: the text in a row, and streams of rows that can be shared and can save their position."""

import abc
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import grain


def text_of(row: Any, field: str | None, place: str) -> Any:
    """The text of a row: the row itself if it is a string, else the value of a field.

    Args:
        row: a string, or a mapping.
        field: the field's name; `None` for the whole row.
        place: the origin of the row, for the message.

    Returns:
        A string, or the row if `field` is None.

    Raises:
        ValueError: if the row lacks the field, or its value is not a string.
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


def optional_module(name: str, needed_for: str) -> ModuleType:
    """Imports a module of the extra `data`.

    Raises:
        ImportError: if it is not installed. The message says `needed_for` and how to install the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{needed_for} needs `{package}`, which is not installed: pip install 'keras-t5gemma[data]'."
        ) from error


class RowStream(grain.IterDataset):
    """A stream of rows, which processes and workers share by the rows' numbers.

        rows                         0 1 2 3 4 5 6 7
        process 0 of 2               0   2   4   6
        its worker 1 of 2                2       6

    Workers take turns, so the rows come in the order of a single process, for any number of workers. A subclass has
    iterators that are `RowIterator`s.

    Args:
        shard_index: index of the process's share.
        shard_count: number of shares.
    """

    def __init__(self, shard_index: int = 0, shard_count: int = 1):
        super().__init__()
        self.shard = shard_index, shard_count
        self.worker = 0, 1

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Restricts the stream to the rows of one of Grain's workers. Grain calls it in the worker, more than once."""
        if sequential_slice:
            raise ValueError("A stream has no length, and so no sequential slices: use `sequential_slice=False`.")
        self.worker = sl.start, sl.step

    def has(self, number: int) -> bool:
        """Whether a row belongs to this process and this worker."""
        index_in_share, share = divmod(number, self.shard[1])
        return share == self.shard[0] and index_in_share % self.worker[1] == self.worker[0]


class RowIterator(grain.DatasetIterator):
    """Iterates over the rows of a `RowStream`. A subclass reads them."""

    def __init__(self, rows: RowStream):
        super().__init__()
        self.rows = rows
        self.number = 0

    @abc.abstractmethod
    def next_row(self) -> Callable[[], Any]:
        """Reads the next row, and returns a function that parses it, which is called only for rows of this process.

        Raises:
            StopIteration: if there are no more rows.
        """

    @abc.abstractmethod
    def get_position(self) -> dict:
        """The position of the next row in the source, as a JSON object."""

    @abc.abstractmethod
    def set_position(self, state: dict) -> None:
        """Continues from a position in the source."""

    def __next__(self) -> Any:
        while True:
            parse = self.next_row()
            self.number += 1
            if self.rows.has(self.number - 1):
                return parse()

    def get_state(self) -> dict:
        """The number of the next row, and its position in the source."""
        return {"number": self.number, **self.get_position()}

    def set_state(self, state: dict) -> None:
        """Continues from a state."""
        self.number = state["number"]
        self.set_position(state)
