"""The progress bar of a run: loss, tokens per second and the time left."""

import datetime
import math
import time

import keras
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def progress_display(console):
    """A `rich.progress.Progress` with a column for what a `ProgressBar` tells of its run."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
        console=console,
    )


class StepLosses(keras.callbacks.Callback):
    """Keeps the training loss of every step.

    Attributes:
        losses: a float a step.
    """

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        """Takes the step's own loss out of the mean over the epoch so far, which is what Keras reports."""
        mean = float(logs["loss"])
        self.losses.append(mean * (batch + 1) - self._sum)
        self._sum = mean * (batch + 1)

    def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002 Keras's signature
        """Keras's means start anew with an epoch."""
        self._sum = 0.0


class ProgressBar(keras.callbacks.Callback):
    """A bar a run, which begins when the run does.

    Args:
        display: a `progress_display`, in use.
        description: what stands before the bar.
        steps: in all.
        tokens: a `TokenRate` among the callbacks before this one, or None for a bar without tokens a second.
        done: called when training begins, gives the batches that were trained on before; None for 0.
    """

    def __init__(self, display, description, steps, *, tokens=None, done=None):
        super().__init__()
        self.display, self.tokens, self.done = display, tokens, done
        self._task = display.add_task(description, total=steps, told="", start=False)

    def time_left(self):
        """By the speed of late, as `["0:01:30 left"]`; an empty list before there is one, and at the end."""
        (seconds,) = (task.time_remaining for task in self.display.tasks if task.id == self._task)
        return [f"{datetime.timedelta(seconds=math.ceil(seconds))} left"] if seconds else []

    def on_train_begin(self, logs=None):  # noqa: ARG002 Keras's signature
        """Starts the clock."""
        self._batches = self.done() if self.done else 0
        self.display.start_task(self._task)
        self.display.update(self._task, completed=self._batches)

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
        """Moves on, and tells the mean loss of the epoch so far."""
        self._batches += 1
        self.display.update(self._task, completed=self._batches)
        told = [f"loss {float(logs['loss']):.3f}"]
        if self.tokens is not None and self.tokens.per_second:
            told.append(f"{self.tokens.per_second:,.0f} tokens/s")
        self.display.update(self._task, told=", ".join([*told, *self.time_left()]))


class TokenRate(keras.callbacks.Callback):
    """Counts the tokens trained on: inputs and targets that are no padding.

    The first batch after a start is left out, which takes as long as compiling takes.

    Args:
        checkpoint: the `TrainingCheckpoint` whose `data` `fit` gets; it knows which batch was trained on.
        processes: how many read as much as this one.

    Attributes:
        per_second: of the epoch so far; None before its second batch.
    """

    def __init__(self, checkpoint, processes=1):
        super().__init__()
        self.checkpoint, self.processes = checkpoint, processes
        self.per_second = None

    def on_train_begin(self, logs=None):  # noqa: ARG002 Keras's signature
        """Finds out where the run goes on."""
        self._number = self.checkpoint.batches
        self._begin = None

    def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002
        """Counts anew: what lies between two epochs, such as evaluating, takes time too."""
        self._tokens, self.per_second = 0, None
        if self._begin is not None:
            self._begin = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
        """Counts."""
        self._number += 1
        now = time.monotonic()
        if self._begin is None:
            self._begin = now
            return
        self._tokens += self.processes * _tokens(self.checkpoint.batch(self._number))
        self.per_second = self._tokens / max(now - self._begin, 1e-9)


def _tokens(batch):
    x = batch[0]
    return sum(int(np.count_nonzero(x[f"{stack}_padding_mask"])) for stack in ("encoder", "decoder"))
