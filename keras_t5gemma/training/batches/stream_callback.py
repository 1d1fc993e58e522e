"""`StreamCallback`: tells streams when a run begins, and warns if an epoch was shorter than requested."""

import keras

from keras_t5gemma._keras_internals import begin_with_epoch
from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.training.batches.streams import Stream


class StreamCallback(keras.callbacks.Callback):
    """Tells streams when a run begins, and warns if an epoch was shorter than requested.

    Args:
        stream: the `Stream` of the data, or None.
        steps: `steps_per_epoch`, or None.

    Attributes:
        validation_stream: the `Stream` of the validation data, or None.
    """

    def __init__(self, stream: Stream | None, steps: int | None = None):
        super().__init__()
        self.stream, self.validation_stream = stream, None
        self._steps, self._done = steps, 0

    def on_train_begin(self, logs: dict | None = None) -> None:  # noqa: ARG002
        """Begins the stream of the data."""
        _begin(self.stream)

    def on_test_begin(self, logs: dict | None = None) -> None:  # noqa: ARG002
        """Begins the stream of the data, and that of the validation data."""
        _begin(self.stream)
        _begin(self.validation_stream)

    def on_predict_begin(self, logs: dict | None = None) -> None:  # noqa: ARG002
        """Begins the stream of the data."""
        _begin(self.stream)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Resets the count of batches."""
        self._done = 0
        # `BackupAndRestore` sets the epoch with which this `fit` begins. Keras would begin each later one with it, too.
        begin_with_epoch(self._model, None)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Counts the batches of the epoch."""
        self._done = batch + 1

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Warns once if the epoch had fewer batches than requested."""
        if self._steps is not None and self._done < self._steps and not self.model.stop_training:
            warn_caller(
                f"The data ended after {self._done} of {self._steps} steps of epoch {epoch + 1}, which ends there. Use "
                f"more data, or `steps_per_epoch={self._done}` or less."
            )
            self._steps = None


def with_callback(callbacks, callback: keras.callbacks.Callback):
    """Adds a callback to the argument of `fit`: a list, one callback, a `CallbackList` or None."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.append(callback)
        return callbacks
    callbacks = [] if callbacks is None else callbacks
    return [*(callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]), callback]


def _begin(stream: Stream | None) -> None:
    if stream is not None:
        stream.begin()
