"""`TrainingLog`: the numbers of a run, one row per epoch, as a CSV file and for TensorBoard."""

import math
import time
from pathlib import Path

import keras

from keras_t5gemma._keras_internals import variable_array
from keras_t5gemma.training.callbacks.log_file import HELD_OUT, LOG_FILE, LogTable
from keras_t5gemma.training.evaluation import mean_loss

TENSORBOARD_FOLDER = "tensorboard"


class TrainingLog(keras.callbacks.Callback):
    """Writes `log.csv`, and TensorBoard's files where asked, into a run's folder; measures held-out loss by denoiser.

        step,loss,accuracy,learning_rate,tokens_per_second,val_loss,val_loss/R_3_0.15,val_loss/S_0.25
        50,8.32,0.011,0.0005,20171.3,,,
        100,7.11,0.052,0.001,20203.9,6.98,6.02,7.94

    A row is the mean over the steps of an epoch, which `steps_per_epoch` of `fit` makes as long as wanted. A run that
    goes on from a checkpoint goes on with its log: rows after the checkpoint are dropped, so that none comes twice.

    Keras's own `CSVLogger` and `TensorBoard` do neither: what they wrote after the checkpoint stays and comes again,
    they know neither tokens a second nor a held-out loss by denoiser, and the latter takes TensorFlow on every backend.

        checkpoint = TrainingCheckpoint("run/checkpoints")
        held_out = held_out_by_part(texts, tokenizer, objective, num_batches=8, batch_size=8)
        log = TrainingLog("run", checkpoint, held_out=held_out, evaluate_every=10)
        lm.fit(checkpoint.data(data), epochs=100, steps_per_epoch=50, callbacks=[log, checkpoint])

    Args:
        folder: of the run; None to measure, but write nothing, as all processes but one do.
        checkpoint: the run's `TrainingCheckpoint`.
        tokens: a `TokenRate` among the callbacks before this one, or None for no such column.
        held_out: what `held_out_by_part` gave, or None.
        evaluate_every: epochs between two measurements.
        tensorboard: whether to write its files, too; it takes the extra `tensorboard`.
        on_row: called with each row, a dict.

    Raises:
        ImportError: where TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        folder,
        checkpoint,
        *,
        tokens=None,
        held_out=None,
        evaluate_every=1,
        tensorboard=False,
        on_row=None,
    ):
        super().__init__()
        self.folder, self.checkpoint, self.tokens = folder, checkpoint, tokens
        self.held_out, self.evaluate_every = held_out or {}, evaluate_every
        self.on_row = on_row
        if tensorboard:
            _event_files()  # not after hours of work
        self._writes_events = tensorboard

    def on_train_begin(self, logs=None):  # noqa: ARG002 Keras's signature
        """Goes on with the log where the run does."""
        step = self.checkpoint.batches
        self._writers = []
        if self.folder is not None:
            self._writers.append(LogTable(Path(self.folder) / LOG_FILE, step))
            if self._writes_events:
                self._writers.append(_Events(Path(self.folder) / TENSORBOARD_FOLDER, step))

    def on_epoch_end(self, epoch, logs=None):
        """Writes a row."""
        row = {"step": (epoch + 1) * self.params["steps"], "loss": math.nan}  # first, whatever order Keras has them in
        row |= {name: float(value) for name, value in (logs or {}).items()}
        row["learning_rate"] = float(variable_array(self.model.optimizer.learning_rate))
        if self.tokens is not None:
            row["tokens_per_second"] = math.nan if self.tokens.per_second is None else self.tokens.per_second
        if self.held_out:
            due = (epoch + 1) % self.evaluate_every == 0
            row |= self._measure() if due else dict.fromkeys(self._columns(), math.nan)
        for writer in self._writers:
            writer.add(row)
        if self.on_row:
            self.on_row(row)

    def on_train_end(self, logs=None):  # noqa: ARG002
        """Closes the files."""
        for writer in self._writers:
            writer.close()

    def _columns(self):
        return [HELD_OUT, *(f"{HELD_OUT}/{name}" for name in self.held_out)]

    def _measure(self):
        losses = [mean_loss(self.model, batches) for batches, _ in self.held_out.values()]
        weights = [weight for _, weight in self.held_out.values()]
        mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
        return dict(zip(self._columns(), [mean, *losses], strict=True))


class _Events:
    """TensorBoard's files, one a start of the run.

    Written by the `tensorboard` package itself, which needs no TensorFlow for that.

    Args:
        folder: of the files.
        step: after which what earlier files hold is void.
    """

    def __init__(self, folder, step):
        self._event, self._summary, session, writer = _event_files()
        self._writer = writer(str(folder))
        if step:
            start = session(status=session.START)
            self._writer.add_event(self._event(step=step + 1, wall_time=time.time(), session_log=start))

    def add(self, row):
        """A scalar a column."""
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and not math.isnan(value)
        ]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(step=row["step"], wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self):
        """Ends the file."""
        self._writer.close()


def _event_files():
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise ImportError(
            "Logs for TensorBoard take the extra `tensorboard`: `pip install 'keras-t5gemma[tensorboard]'`. "
            "log.csv is written without it."
        ) from error
    return Event, Summary, SessionLog, EventFileWriter
