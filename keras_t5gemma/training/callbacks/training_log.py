"""`TrainingLog`: the numbers of a run, one row per epoch, as a CSV file and for TensorBoard."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import keras

from keras_t5gemma._keras_internals import variable_array
from keras_t5gemma.training.callbacks.log_file import HELD_OUT, LOG_FILE, LogTable
from keras_t5gemma.training.callbacks.progress_bar import TokenRate
from keras_t5gemma.training.evaluation import mean_loss

TENSORBOARD_FOLDER = "tensorboard"


class TrainingLog(keras.callbacks.Callback):
    """Writes `log.csv`, and optionally TensorBoard's files, into a run's folder; measures held-out loss per denoiser.

        step,loss,accuracy,learning_rate,tokens_per_second,val_loss,val_loss/R_3_0.15,val_loss/S_0.25
        50,8.32,0.011,0.0005,20171.3,,,
        100,7.11,0.052,0.001,20203.9,6.98,6.02,7.94

    A row is the mean over the steps of an epoch; `steps_per_epoch` of `fit` sets its length. A run that resumes from a
    checkpoint continues its log: rows after the checkpoint are dropped, so that no step is logged twice.

    Keras's own `CSVLogger` and `TensorBoard` keep the rows after the checkpoint and log these steps again. They record
    neither tokens per second nor a held-out loss per denoiser, and `TensorBoard` needs TensorFlow.

        checkpoint = TrainingCheckpoint("run/checkpoints")
        held_out = held_out_by_part(texts, tokenizer, objective, num_batches=8, batch_size=8)
        log = TrainingLog("run", checkpoint, held_out=held_out, evaluate_every=10)
        lm.fit(checkpoint.data(data), epochs=100, steps_per_epoch=50, callbacks=[log, checkpoint])

    The held-out loss is in the logs too, as `val_loss`, NaN in the epochs between two measurements. So callbacks that
    come after this one can follow it, such as `TrainingCheckpoint(best="val_loss")`.

    Args:
        folder: the run's folder; None to measure without writing, as in all processes but one.
        checkpoint: the run's `TrainingCheckpoint`.
        tokens: a `TokenRate`, which comes before this callback in the list, or None for no such column.
        held_out: the result of `held_out_by_part`, or None.
        evaluate_every: epochs between two measurements of the held-out loss.
        tensorboard: whether to write TensorBoard's files too; it needs the extra `tensorboard`.
        on_row: called with each row, a dict; or None.

    Raises:
        ImportError: if `tensorboard=True` and TensorBoard is not installed.
    """

    def __init__(
        self,
        folder: str | Path | None,
        checkpoint,
        *,
        tokens: TokenRate | None = None,
        held_out: dict[str, tuple[list, float]] | None = None,
        evaluate_every: int = 1,
        tensorboard: bool = False,
        on_row: Callable[[dict[str, float]], object] | None = None,
    ):
        super().__init__()
        self.folder, self.checkpoint, self.tokens = folder, checkpoint, tokens
        self.held_out, self.evaluate_every = held_out or {}, evaluate_every
        self.on_row = on_row
        if tensorboard:
            _event_files()  # fails now, not at the first row
        self._writes_events = tensorboard

    def on_train_begin(self, logs: dict | None = None) -> None:  # noqa: ARG002 Keras's signature
        """Opens the log, and drops rows after the step from which the run resumes."""
        step = self.checkpoint.batches
        self._writers = []
        if self.folder is not None:
            self._writers.append(LogTable(Path(self.folder) / LOG_FILE, step))
            if self._writes_events:
                self._writers.append(_Events(Path(self.folder) / TENSORBOARD_FOLDER, step))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes a row."""
        row = {"step": (epoch + 1) * self.params["steps"], "loss": math.nan}  # the first columns, in any Keras version
        row |= {name: float(value) for name, value in (logs or {}).items()}
        row["learning_rate"] = float(variable_array(self.model.optimizer.learning_rate))
        if self.tokens is not None:
            row["tokens_per_second"] = math.nan if self.tokens.per_second is None else self.tokens.per_second
        if self.held_out:
            due = (epoch + 1) % self.evaluate_every == 0
            measured = self._measure() if due else dict.fromkeys(self._columns(), math.nan)
            row |= measured
            if logs is not None:  # for the callbacks that come after this one
                logs |= measured
        for writer in self._writers:
            writer.add(row)
        if self.on_row:
            self.on_row(row)

    def on_train_end(self, logs: dict | None = None) -> None:  # noqa: ARG002
        """Closes the files."""
        for writer in self._writers:
            writer.close()

    def _columns(self) -> list[str]:
        return [HELD_OUT, *(f"{HELD_OUT}/{name}" for name in self.held_out)]

    def _measure(self) -> dict[str, float]:
        """The held-out loss in nats, overall and per denoiser, by column."""
        losses = [mean_loss(self.model, batches) for batches, _ in self.held_out.values()]
        weights = [weight for _, weight in self.held_out.values()]
        mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
        return dict(zip(self._columns(), [mean, *losses], strict=True))


class _Events:
    """Writes TensorBoard's files, one per start of the run.

    The `tensorboard` package itself writes them, which works without TensorFlow.

    Args:
        folder: the folder of the files.
        step: TensorBoard ignores rows of earlier files after this step.
    """

    def __init__(self, folder: Path, step: int):
        self._event, self._summary, session, writer = _event_files()
        self._writer = writer(str(folder))
        if step:
            start = session(status=session.START)
            self._writer.add_event(self._event(step=step + 1, wall_time=time.time(), session_log=start))

    def add(self, row: dict[str, float]) -> None:
        """Writes a row, one scalar per column; NaN is left out."""
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and not math.isnan(value)
        ]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(step=row["step"], wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def _event_files() -> tuple[type, ...]:
    """Imports TensorBoard's classes: `(Event, Summary, SessionLog, EventFileWriter)`.

    Raises:
        ImportError: if TensorBoard is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise ImportError(
            "Logs for TensorBoard need the extra `tensorboard`: `pip install 'keras-t5gemma[tensorboard]'`. "
            "log.csv is written without it."
        ) from error
    return Event, Summary, SessionLog, EventFileWriter
