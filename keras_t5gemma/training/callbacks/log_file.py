"""The log of a run as a CSV file: reading, writing, and appending to it. Needs no Keras."""

import csv
import math
from pathlib import Path

LOG_FILE = "log.csv"
# The column of the held-out loss; by denoiser it is this, a slash and the denoiser's name.
HELD_OUT = "val_loss"


def read_log(run):
    """The log of a run.

    Args:
        run: its folder, or the CSV file itself.

    Returns:
        `{column: (steps, values)}`, two lists of numbers; a row that has no value in a column is left out of it.

    Raises:
        ValueError: where there is no log, or a row of it is none.
    """
    path = Path(run) / LOG_FILE if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise ValueError(f"{run} holds no {LOG_FILE}: it is no folder of a run, or nothing has been logged yet.")
    columns = {}
    for row in _rows(path):
        for name, value in row.items():
            if name != "step" and value:
                steps, values = columns.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    return columns


def _rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        try:
            [float(value) for value in row.values() if value]
            int(row["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: expected a number a column, `step` first.") from error
    return rows


class LogTable:
    """A CSV file that is complete after each row.

    Args:
        path: of the file.
        step: the last row to keep of what is there.
    """

    def __init__(self, path, step):
        self._path = path
        # A row that a killed run wrote half of is after its checkpoint, too.
        rows = _whole_rows(path) if path.is_file() else []
        self._rows = [row for row in rows if int(row["step"]) <= step]
        self._names = list(dict.fromkeys(name for row in self._rows for name in row))
        if rows:
            self._rewrite()

    def add(self, row):
        """Appends a row, a dict of numbers with a `step`; NaN is written as nothing."""
        row = {name: "" if math.isnan(value) else f"{value:.7g}" for name, value in row.items()} | {"step": row["step"]}
        self._rows.append(row)
        if new := [name for name in row if name not in self._names]:
            self._names += new
            self._rewrite()
            return
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._names).writerow(row)

    def close(self):
        """Nothing is left to do: a row is written when it is added."""

    def _rewrite(self):
        partial = self._path.with_name(f".{self._path.name}.partial")
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._names, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        partial.replace(self._path)


def _whole_rows(path):
    """The rows of a file but for a last line that has no end."""
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return list(csv.DictReader(lines))
