"""Where the time of a run went, over all its starts: `times.json`."""

import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_t5gemma import strict_json
from keras_t5gemma.atomic_file import write_atomically
from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint

TIMES_FILE = "times.json"
_STEPS = "steps"
# What a second was spent on -> how the summary calls it.
KINDS = {
    "preparing": "model and data",
    "first_step": "first step, with compiling",
    _STEPS: "steps",
    "waiting_for_data": "waiting for data",
    "measuring": "measuring and logging",
    "saving": "saving",
}


class RunTimes(keras.callbacks.Callback):
    """Records the seconds of each start of a run. It comes first in the list of callbacks.

        {"starts": [{"started": "2026-11-30T09:00:00+00:00", "first_batch": 0, "last_batch": 500, "repeated": 0,
                     "seconds": {"preparing": 61.2, "first_step": 40.5, "steps": 800.1, ...}}, ...]}

    The file is written after each row of the log, so a start that was killed has its times up to its last row.
    `repeated` is how many batches were trained on again, because an earlier start had not saved them; those of a killed
    start after its last row are unknown and not counted. `waiting_for_data` includes the batch's way to the device, and
    Keras's own work between two steps.

    Args:
        path: the file; earlier starts in it stay.
        checkpoint: the run's.
        began: when the start of the run began, of `time.perf_counter`.
        clock: for tests, in place of `time.perf_counter`.
    """

    def __init__(
        self, path: Path, checkpoint: TrainingCheckpoint, began: float, clock: Callable[[], float] = time.perf_counter
    ):
        super().__init__()
        self._path, self._checkpoint, self._clock = path, checkpoint, clock
        self._last, self._saved = began, 0.0
        self._starts: list[dict[str, Any]] = []
        self._row: dict[str, Any] = {}

    def on_train_begin(self, logs: dict | None = None) -> None:  # noqa: ARG002 Keras's signature
        """Begins a start; the checkpoint has restored the run."""
        self._starts = strict_json.read_object(self._path)["starts"] if self._path.is_file() else []
        first = self._checkpoint.batches
        reached = max((start["last_batch"] for start in self._starts), default=0)
        self._row = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "first_batch": first,
            "last_batch": first,
            "repeated": max(0, reached - first),
            "seconds": dict.fromkeys(KINDS, 0.0),
        }
        self._starts.append(self._row)
        self._count("preparing")

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Ends the wait for a batch."""
        self._count("waiting_for_data" if self._row["seconds"]["first_step"] else "first_step")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Ends a step."""
        is_first = self._row["last_batch"] == self._row["first_batch"]
        self._row["last_batch"] += 1
        self._count("first_step" if is_first else _STEPS)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Ends the steps of a row."""
        self._count("waiting_for_data")

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Ends the work between two rows."""
        if self._row["last_batch"] > self._row["first_batch"]:
            self._count("measuring")
            self._write()

    def end(self) -> None:
        """Ends the start, after `fit`, also if an exception ended it."""
        if self._row:
            self._count("measuring")
            self._write()

    def summary(self) -> str:
        """One line on all starts of the run."""
        total = {kind: sum(start["seconds"][kind] for start in self._starts) for kind in KINDS}
        whole = sum(total.values()) or 1.0
        shares = ", ".join(f"{name} {total[kind] / whole:.0%}" for kind, name in KINDS.items())
        again = sum(start["repeated"] for start in self._starts)
        starts = f" of {len(self._starts)} starts" if len(self._starts) > 1 else ""
        return f"{_duration(whole)}{starts}: {shares}.{f' Repeated steps: {again}.' if again else ''}"

    def _count(self, kind: str) -> None:
        """Adds the seconds since the last call, without those of saving, which have their own kind."""
        now, saved = self._clock(), self._checkpoint.writer.seconds
        seconds = self._row["seconds"]
        seconds["saving"] += saved - self._saved
        seconds[kind] += now - self._last - (saved - self._saved)
        self._last, self._saved = now, saved

    def _write(self) -> None:
        rounded = [
            {**start, "seconds": {kind: round(x, 3) for kind, x in start["seconds"].items()}} for start in self._starts
        ]
        write_atomically(self._path, json.dumps({"starts": rounded}, indent=1) + "\n")


def _duration(seconds: float) -> str:
    """Seconds as `h:mm:ss`."""
    return str(datetime.timedelta(seconds=round(seconds)))
