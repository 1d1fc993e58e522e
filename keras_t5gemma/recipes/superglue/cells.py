"""The grid of a task, and the results of its cells on disk. Needs no Keras."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_t5gemma import strict_json
from keras_t5gemma.atomic_file import write_atomically
from keras_t5gemma.checks import integer, is_number

# The paper searches over learning rate, batch size and dropout, and gives no values. These are RoBERTa's for GLUE
# (arXiv 1907.11692, table 10), with its dropout and without; so are the epochs.
LEARNING_RATES = (1e-5, 2e-5, 3e-5)
BATCH_SIZES = (16, 32)
DROPOUTS = (0.0, 0.1)
EPOCHS = 10

CELLS_FOLDER, SETTINGS_FILE = "cells", "settings.json"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training of the grid.

    Attributes:
        task: a name in `TASKS`.
        learning_rate: the peak of the schedule.
        batch_size: B.
        dropout: the rate before the head.
    """

    task: str
    learning_rate: float
    batch_size: int
    dropout: float

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.task}_rate_{self.learning_rate:g}_batch_{self.batch_size}_dropout_{self.dropout:g}"

    def __str__(self):
        return f"{self.task}, rate {self.learning_rate:g}, batch {self.batch_size}, dropout {self.dropout:g}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values of a grid.

    Attributes:
        learning_rates: positive numbers.
        batch_sizes: positive integers.
        dropouts: numbers in [0, 1).

    Raises:
        ValueError: if a list is empty, or has a value twice or out of range.
    """

    learning_rates: Sequence[float] = LEARNING_RATES
    batch_sizes: Sequence[int] = BATCH_SIZES
    dropouts: Sequence[float] = DROPOUTS

    def __post_init__(self):
        for name in ("learning_rates", "batch_sizes", "dropouts"):
            values = getattr(self, name)
            if isinstance(values, (str, bytes)) or not len(values) or len(set(values)) < len(values):
                raise ValueError(f"`{name}` must hold different values, at least one. Received: {values!r}.")
        for size in self.batch_sizes:
            integer(size, "batch_sizes")
        if wrong := [rate for rate in self.learning_rates if not (is_number(rate) and rate > 0)]:
            raise ValueError(f"`learning_rates` must be positive. Received: {wrong[0]!r}.")
        if wrong := [rate for rate in self.dropouts if not (is_number(rate) and 0 <= rate < 1)]:
            raise ValueError(f"`dropouts` must be in [0, 1). Received: {wrong[0]!r}.")

    def cells(self, task: str) -> Iterator[Cell]:
        """The cells of a task."""
        for values in itertools.product(self.learning_rates, self.batch_sizes, self.dropouts):
            yield Cell(task, *values)


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings that all cells of a folder share, or compares them with those of a run that continues.

    Args:
        folder: the run's.
        settings: names and JSON-ready values.

    Raises:
        ValueError: if the run was begun with others, or the folder holds something else.
    """
    path = folder / SETTINGS_FILE
    if path.is_file():
        before = strict_json.read_object(path)
        if changed := [name for name in settings if settings[name] != before.get(name)]:
            changes = "; ".join(f"{name} was {before.get(name)!r}, is {settings[name]!r}" for name in changed)
            raise ValueError(
                f"{folder} holds a run with other settings: {changes}. Put that back to go on with it, or "
                f"choose another folder. Tasks and the values of the grid may change."
            )
        return
    if stray := sorted(entry.name for entry in folder.iterdir() if entry.name[0] != "."):
        raise ValueError(f"{folder} holds no run but {', '.join(stray[:3])}. Choose a folder that is new or empty.")
    write_json(path, settings)


def read_result(folder: Path, cell: Cell, checksums: Sequence[str]) -> dict[str, Any] | None:
    """The result of a cell, or None if it has not been trained.

    Args:
        folder: the run's.
        cell: the cell.
        checksums: of the task's files.

    Raises:
        ValueError: if it was trained on other files.
    """
    path = _path(folder, cell)
    if not path.is_file():
        return None
    result = strict_json.read_object(path)
    if result["checksums"] != list(checksums):
        raise ValueError(
            f"{path} was trained on other files of {cell.task}. Put these back to go on with the run, or choose "
            f"another folder."
        )
    return result


def write_result(folder: Path, cell: Cell, checksums: Sequence[str], result: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the result of a cell, and returns it as `read_result` does. The file appears when it is complete."""
    content = {**dataclasses.asdict(cell), **result, "checksums": list(checksums)}
    _path(folder, cell).parent.mkdir(exist_ok=True)
    write_json(_path(folder, cell), content)
    return content


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to a file, which appears, or is replaced, when it is complete."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def _path(folder: Path, cell: Cell) -> Path:
    return folder / CELLS_FOLDER / f"{cell.name}.json"
