"""The log of a run as a CSV file: reading, writing, and appending to it. Works without Keras."""

import csv
import io
import math
from pathlib import Path

from keras_t5gemma.atomic_file import write_atomically

LOG_FILE = "log.csv"
# The column of the held-out loss. The column of one denoiser adds a slash and the denoiser's name.
HELD_OUT = "val_loss"


def read_log(run: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """The log of a run.

    Args:
        run: the run's folder, or the CSV file itself.

    Returns:
        `{column: (steps, values)}`, two lists of numbers; rows without a value in a column are left out of it.

    Raises:
        ValueError: if there is no log, or a row is invalid.
    """
    path = Path(run) / LOG_FILE if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise ValueError(f"{run} holds no {LOG_FILE}: it is not the folder of a run, or nothing has been logged yet.")
    columns = {}
    for row in _rows(path):
        for name, value in row.items():
            if name != "step" and value:
                steps, values = columns.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    return columns


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log file, checked to hold numbers.

    Raises:
        ValueError: if a row holds anything else.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        try:
            [float(value) for value in row.values() if value]
            int(row["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: expected one number per column, `step` first.") from error
    return rows


class LogTable:
    """A CSV file that is complete after each row.

    Args:
        path: the file, which may exist.
        step: existing rows after this step are dropped.
    """

    def __init__(self, path: Path, step: int):
        self._path = path
        # A row that a killed run wrote only in part is dropped too: it is later than the run's checkpoint.
        rows = _complete_rows(path) if path.is_file() else []
        self._rows = [row for row in rows if int(row["step"]) <= step]
        self._names = list(dict.fromkeys(name for row in self._rows for name in row))
        if rows:
            self._rewrite()

    def add(self, row: dict[str, float]) -> None:
        """Appends a row, a dict of numbers with a `step`; NaN is written as an empty cell."""
        row = {name: "" if math.isnan(value) else f"{value:.7g}" for name, value in row.items()} | {"step": row["step"]}
        self._rows.append(row)
        if new := [name for name in row if name not in self._names]:
            self._names += new
            self._rewrite()
            return
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._names).writerow(row)

    def close(self) -> None:
        """Does nothing: each row is written when it is added."""

    def _rewrite(self) -> None:
        """Replaces the file by one with all rows and columns."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._names, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self._path, text.getvalue())


def _complete_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, without a last line that does not end in a newline."""
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return list(csv.DictReader(lines))
