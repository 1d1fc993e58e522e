"""The progress bar of a run: loss, tokens per second and the time left."""

import datetime
import math
import time
from collections.abc import Callable, Mapping

import keras
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def progress_display(console: Console) -> Progress:
    """A `rich.progress.Progress` with a column for the status of a `ProgressBar`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


class StepLosses(keras.callbacks.Callback):
    """Records the training loss of every step.

    Attributes:
        losses: one float per step.
    """

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Computes the step's own loss from the mean over the epoch so far, which Keras reports."""
        mean = float(logs["loss"])
        self.losses.append(mean * (batch + 1) - self._sum)
        self._sum = mean * (batch + 1)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:  # noqa: ARG002 Keras's signature
        """Resets the sum, as Keras resets its means."""
        self._sum = 0.0


class ProgressBar(keras.callbacks.Callback):
    """A progress bar of one run, which starts when training starts.

    Args:
        display: a `progress_display` that is active.
        description: the text before the bar.
        steps: the total number of steps.
        tokens: a `TokenRate`, which comes before this callback in the list, or None for a bar without tokens per
            second.
        done: `() -> int`, called when training begins: the number of batches that the run has trained on before; None
            for 0.
    """

    def __init__(
        self,
        display: Progress,
        description: str,
        steps: int,
        *,
        tokens: "TokenRate | None" = None,
        done: Callable[[], int] | None = None,
    ):
        super().__init__()
        self.display, self.tokens, self.done = display, tokens, done
        self._task = display.add_task(description, total=steps, status="", start=False)

    def time_left(self) -> list[str]:
        """The remaining time by the recent speed, as `["0:01:30 left"]`.

        The list is empty as long as the speed is unknown, and at the end.
        """
        (seconds,) = (task.time_remaining for task in self.display.tasks if task.id == self._task)
        return [f"{datetime.timedelta(seconds=math.ceil(seconds))} left"] if seconds else []

    def on_train_begin(self, logs: dict | None = None) -> None:  # noqa: ARG002 Keras's signature
        """Starts the clock."""
        self._batches = self.done() if self.done else 0
        self.display.start_task(self._task)
        self.display.update(self._task, completed=self._batches)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Advances the bar, and shows the mean loss of the epoch so far."""
        self._batches += 1
        self.display.update(self._task, completed=self._batches)
        status = [f"loss {float(logs['loss']):.3f}"]
        if self.tokens is not None and self.tokens.per_second:
            status.append(f"{self.tokens.per_second:,.0f} tokens/s")
        self.display.update(self._task, status=", ".join([*status, *self.time_left()]))


class TokenRate(keras.callbacks.Callback):
    """Measures the tokens per second of training: inputs and targets without padding.

    The first batch after a start does not count, because it includes the time to compile.

    Args:
        checkpoint: the `TrainingCheckpoint` whose `data` is passed to `fit`; it knows which batch was trained on.
        processes: the number of processes, which are assumed to read as many tokens as this one.

    Attributes:
        per_second: the rate of the epoch so far; None before the second batch.
    """

    def __init__(self, checkpoint, processes: int = 1):
        super().__init__()
        self.checkpoint, self.processes = checkpoint, processes
        self.per_second = None

    def on_train_begin(self, logs: dict | None = None) -> None:  # noqa: ARG002 Keras's signature
        """Reads the number of the batch from which the run continues."""
        self._number = self.checkpoint.batches
        self._begin = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Restarts the count and the clock: work between two epochs, such as evaluation, takes time too."""
        self._tokens, self.per_second = 0, None
        if self._begin is not None:
            self._begin = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Adds the batch's tokens, and updates the rate."""
        self._number += 1
        now = time.monotonic()
        if self._begin is None:
            self._begin = now
            return
        self._tokens += self.processes * _tokens(self.checkpoint.batch(self._number))
        self.per_second = self._tokens / max(now - self._begin, 1e-9)


def _tokens(batch: tuple) -> int:
    """The tokens of a batch without padding: of encoder and decoder, a classifier's texts, an embedder's columns."""
    x = batch[0]
    inputs = [x, *(column for column in x.values() if isinstance(column, Mapping))]
    masks = [array for item in inputs for name, array in item.items() if name.endswith("padding_mask")]
    return sum(int(np.count_nonzero(mask)) for mask in masks)
