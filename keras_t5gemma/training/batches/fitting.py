"""`fit`, `evaluate` and `predict` on all data that `keras.Model` accepts, texts or token ids."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping

import keras
import numpy as np

from keras_t5gemma._keras_internals import RestoresTrainingState, tensor_of
from keras_t5gemma.checks import check_token_ids
from keras_t5gemma.concurrency import changing
from keras_t5gemma.kernels.device import devices_of_a_batch
from keras_t5gemma.training.batches.answers import AnswerArrays
from keras_t5gemma.training.batches.arrays import FORM, INPUT_NAMES, TEXT_NAMES, BatchArrays, described, renamed
from keras_t5gemma.training.batches.graph import in_graph
from keras_t5gemma.training.batches.rows import split_rows
from keras_t5gemma.training.batches.sources import BatchSource
from keras_t5gemma.training.batches.stream_callback import StreamCallback, with_callback
from keras_t5gemma.training.batches.streams import Stream
from keras_t5gemma.training.losses.answers import AnswerLoss
from keras_t5gemma.training.losses.cross_entropy import VocabularyCrossEntropy

# Keras's warning at the end of data without a length, and PyTorch's warning about Keras's transposition of int8 scales.
_SUPPRESSED_WARNINGS = ("Your input ran out of data", "The use of `x.T` on tensors of dimension other than 2")


class Fits(RestoresTrainingState):
    """Mixed into a keras-hub task that has a T5Gemma `backbone` and perhaps a `preprocessor`.

    keras-hub's own `fit` accepts arrays, `tf.data` and Grain. Here all kinds of data become the same kind of batches,
    which are checked on the host as they are read.
    """

    def fit(
        self,
        x=None,
        y=None,
        batch_size: int | None = None,
        sample_weight=None,
        validation_data=None,
        validation_split: float = 0.0,
        *,
        shuffle: bool = True,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        callbacks: list[keras.callbacks.Callback] | keras.callbacks.Callback | None = None,
        class_weight: None = None,
        **kwargs,
    ) -> keras.callbacks.History:
        """Trains, as `keras.Model.fit` does.

        Args:
            x: in memory, a dict of B rows: of texts (or conversations), `encoder_text` and `decoder_text`; or of token
                ids, `encoder_token_ids` and `decoder_token_ids`, arrays or lists of rows of any length, with or without
                `encoder_padding_mask` and `decoder_padding_mask`; or Hugging Face's `input_ids`, `attention_mask` and
                `labels`, such as a `BatchEncoding`; or a `datasets.Dataset` with such columns. Or batches of any of
                these, x, (x, y) or (x, y, sample_weight): a `pretraining_dataset` or another Grain dataset, a
                `tf.data.Dataset`, a `keras.utils.PyDataset`, a `torch.utils.data.DataLoader`, a generator.
            y: labels for token ids, [B, T], -100 at positions without a label. If None, the decoder's ids moved one to
                the left. For texts the preprocessor creates them.
            batch_size: rows per step, for rows in memory; 32 if None.
            sample_weight: [B], one per row; or, for token ids, [B, T], one per label. If None, 1 for labels that are
                neither -100 nor `<pad>`, at positions of the decoder that are not padding.
            validation_data: as x, or a tuple of x, y and weights.
            validation_split: the fraction of a dict's rows, taken from the end, to validate on instead.
            shuffle: whether rows in memory are read in another order each epoch; a dataset has its own order.
            epochs: how often to read the data, or `steps_per_epoch` batches of them.
            steps_per_epoch: batches per epoch; all if None. It is required for data without end, and for a generator
                with more than one epoch.
            validation_steps: batches of `validation_data` per validation; all if None.
            validation_batch_size: rows per batch of `validation_data`; `batch_size` if None.
            callbacks: `keras.callbacks.Callback`s.
            class_weight: must be None.
            **kwargs: further arguments of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: if the data have another form, never end, or hold ids outside the vocabulary or shapes that do
                not match; or if the model is not compiled.
        """
        if class_weight is not None:
            raise ValueError(
                "`class_weight` must be None: a label is a token here. Use `sample_weight`, [B] or [B, T]."
            )
        _check_ids(self, x)
        _check_has_checkpoint(x, callbacks)
        if validation_split and validation_data is None:
            if not isinstance(x, Mapping):
                raise ValueError(
                    f"`validation_split` needs a dict of rows in memory; pass `validation_data`. Received: x of "
                    f"{described(x)}."
                )
            (x, y, sample_weight), validation_data = split_rows(x, y, sample_weight, validation_split)
        options = {"batch_size": batch_size, "shuffle": shuffle, "steps_name": "steps_per_epoch"}
        source = self.batch_source(x, y, sample_weight, **options)
        to_arrays = self._to_arrays(for_devices=True)
        batches = source.batches(to_arrays, steps=steps_per_epoch, passes=epochs)
        stream_callback = StreamCallback(batches.stream, steps_per_epoch)
        if validation_data is not None:
            columns = with_nones(validation_data)
            if isinstance(columns[0], Mapping):
                _check_ids(self, columns[0])
            size = validation_batch_size or batch_size if _has_rows(columns[0]) else None
            validation_source = self.batch_source(*columns, batch_size=size, steps_name="validation_steps")
            validation = validation_source.batches(to_arrays, steps=validation_steps, passes=epochs)
            validation_data, stream_callback.validation_stream = validation.dataset, validation.stream
            validation_steps = steps_for_keras(validation_steps, validation.steps, validation.stream)
        with warnings_suppressed():
            return self._by_keras(
                "fit",
                batches.dataset,
                validation_data=validation_data,
                shuffle=False,
                epochs=epochs,
                steps_per_epoch=steps_for_keras(steps_per_epoch, batches.steps, batches.stream),
                validation_steps=validation_steps,
                callbacks=with_callback(callbacks, stream_callback),
                **kwargs,
            )

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size: int | None = None,
        sample_weight=None,
        *,
        steps: int | None = None,
        callbacks: list[keras.callbacks.Callback] | keras.callbacks.Callback | None = None,
        **kwargs,
    ):
        """The loss and the metrics of data, as `keras.Model.evaluate` returns them.

        Loss and accuracy are means over all target tokens, however these are distributed over batches.

        Args:
            x: as for `fit`.
            y: as for `fit`.
            batch_size: as for `fit`.
            sample_weight: as for `fit`.
            steps: the number of batches; all if None.
            callbacks: `keras.callbacks.Callback`s.
            **kwargs: further arguments of `keras.Model.evaluate`.

        Raises:
            ValueError: as for `fit`.
        """
        if kwargs.get("_use_cached_eval_dataset", False):  # from within `fit`
            return self._by_keras(
                "evaluate", x, y, batch_size, sample_weight=sample_weight, steps=steps, callbacks=callbacks, **kwargs
            )
        _check_ids(self, x)
        batches = self.batch_source(x, y, sample_weight, batch_size=batch_size).batches(
            self._to_arrays(for_devices=True), steps=steps
        )
        with warnings_suppressed():
            return self._by_keras(
                "evaluate",
                batches.dataset,
                steps=steps_for_keras(steps, batches.steps, batches.stream),
                callbacks=with_callback(callbacks, StreamCallback(batches.stream)),
                **kwargs,
            )

    def predict(
        self,
        x=None,
        batch_size: int | None = None,
        *,
        steps: int | None = None,
        callbacks: list[keras.callbacks.Callback] | keras.callbacks.Callback | None = None,
        **kwargs,
    ) -> np.ndarray:
        """The logits [B, T, V], as `keras.Model.predict` returns them.

        Args:
            x: as for `fit`.
            batch_size: as for `fit`.
            steps: the number of batches; all if None.
            callbacks: `keras.callbacks.Callback`s.
            **kwargs: further arguments of `keras.Model.predict`.

        Raises:
            ValueError: as for `fit`.
        """
        _check_ids(self, x)
        batches = self.batch_source(x, batch_size=batch_size).batches(self._to_arrays(), steps=steps)
        with warnings_suppressed():
            return self._by_keras(
                "predict",
                batches.dataset,
                steps=steps_for_keras(steps, batches.steps, batches.stream),
                callbacks=with_callback(callbacks, StreamCallback(batches.stream)),
                **kwargs,
            )

    def train_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """One training step, as by `keras.Model.train_on_batch`.

        Args:
            x: a batch, as for `fit`.
            y: as for `fit`.
            sample_weight: as for `fit`.
            **kwargs: further arguments of `keras.Model.train_on_batch`.
        """
        return self._on_batch("train_on_batch", x, y, sample_weight, **kwargs)

    def test_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """The loss and the metrics of a batch, as `keras.Model.test_on_batch` returns them.

        Args:
            x: a batch, as for `fit`.
            y: as for `fit`.
            sample_weight: as for `fit`.
            **kwargs: further arguments of `keras.Model.test_on_batch`.
        """
        return self._on_batch("test_on_batch", x, y, sample_weight, **kwargs)

    def _on_batch(self, name: str, x, y, sample_weight, **kwargs):
        # Not by keras-hub, which would convert labels with a teacher's view to one tensor.
        batch = self.preprocess_samples(x, y, sample_weight)
        return self._by_keras(name, *map(_tensors, batch), **kwargs)

    def _by_keras(self, name: str, *args, **kwargs):
        """Calls Keras's own method of that name, one caller at a time as in `Guarded`.

        keras-hub's method would convert the data to other batches.
        """
        with changing(self, name):
            try:
                return getattr(keras.Model, name)(self, *args, **kwargs)
            except BaseException:
                # An error in the data may be found in any batch.
                self._restore_training_state()
                raise
            finally:
                self._give_back = None

    def preprocess_samples(self, x, y=None, sample_weight=None) -> tuple:
        """Converts a batch to the model's arrays: preprocesses texts, and checks token ids.

        Args:
            x: a batch, as for `fit`.
            y: as for `fit`.
            sample_weight: as for `fit`.

        Returns:
            `(x, y, sample_weight)`.
        """
        return self._to_arrays()(x, y, sample_weight)

    # Opens the data of `fit`, `evaluate` and `predict`.
    batch_source: Callable[..., BatchSource] = staticmethod(BatchSource)

    def _to_arrays(self, for_devices: bool = False) -> Callable:
        """The function that converts a batch to the model's arrays.

        Args:
            for_devices: whether to round the number of rows up to a multiple of the devices that share a batch.

        Returns:
            `(x, y, sample_weight) -> (x, y, sample_weight)`.
        """
        loss, multiple = getattr(self, "loss", None), devices_of_a_batch()[1] if for_devices else 1
        if isinstance(loss, AnswerLoss):
            return AnswerArrays(loss, self.backbone.config.vocabulary_size, multiple)
        any_targets = not isinstance(loss, VocabularyCrossEntropy)
        arrays = BatchArrays(self.backbone.config.vocabulary_size, any_targets, multiple)
        preprocessor = self.preprocessor

        def to_arrays(x, y=None, sample_weight=None):
            if not (isinstance(x, Mapping) and {"encoder_token_ids", "input_ids"} & set(x)):
                if preprocessor is None:
                    renamed(x)  # raises an error that shows the form
                if not (isinstance(x, Mapping) and set(TEXT_NAMES) & set(x)):
                    raise ValueError(f"{FORM} Received: x={described(x)}.")
                if single := [name for name in TEXT_NAMES if name in x and _is_single_text(x[name])]:
                    raise ValueError(f"`{single[0]}` is a single text, and must be a batch of texts. {FORM}")
                x, y, sample_weight = preprocessor.call(_texts(x), y=y, sample_weight=sample_weight)
                if multiple == 1:
                    return x, y, sample_weight
            if y is not None and set(INPUT_NAMES) <= set(x) and _on_a_device(x):
                return x, y, sample_weight
            return in_graph(arrays, x, y, sample_weight)

        return to_arrays


def _tensors(part):
    """A part of a batch as tensors: an array, a list of numbers, a mapping of these, or None."""
    if isinstance(part, Mapping):
        return {name: _tensors(value) for name, value in part.items()}
    return None if part is None else tensor_of(part)


@contextlib.contextmanager
def warnings_suppressed() -> Iterator[None]:
    """Suppresses `_SUPPRESSED_WARNINGS`."""
    filters = list(warnings.filters)
    for message in _SUPPRESSED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    added = [entry for entry in warnings.filters if entry not in filters]
    try:
        yield
    finally:
        # Not `warnings.catch_warnings`, which would also remove filters that callbacks have added.
        for entry in added:
            if entry in warnings.filters:
                warnings.filters.remove(entry)


def _check_has_checkpoint(x, callbacks) -> None:
    """Raises a ValueError if x is data of a `TrainingCheckpoint` that is not among the callbacks."""
    callback = getattr(x, "callback", None)
    listed = getattr(callbacks, "callbacks", callbacks) or []  # of a `CallbackList`
    if callback is not None and callback() not in (listed if isinstance(listed, (list, tuple)) else [listed]):
        raise ValueError(
            "`callbacks` must have the TrainingCheckpoint that these data are from: without it nothing is saved."
        )


def steps_for_keras(requested: int | None, available: int | None, stream: Stream | None) -> int | None:
    """The steps to pass to Keras.

    Args:
        requested: the user's number, or None.
        available: the number of batches per pass, None if unknown.
        stream: the `Stream` of the data, which may start again within an epoch; None if each epoch is one pass.

    Returns:
        The requested steps, but not more than available without a stream; the available steps if `requested` is None.
    """
    if requested is None or available is None or stream is not None:
        return available if requested is None else requested
    return min(requested, available)


def with_nones(data) -> tuple:
    """`(x, y, sample_weight)` of `validation_data`, with None for missing items."""
    parts = data if isinstance(data, (tuple, list)) else (data,)
    return tuple(parts) + (None,) * (3 - len(parts))


def _has_rows(x) -> bool:
    """Whether x is rows, which are not in batches yet."""
    datasets = sys.modules.get("datasets")
    return isinstance(x, Mapping) or (
        datasets is not None and isinstance(x, (datasets.Dataset, datasets.IterableDataset))
    )


def _check_ids(model, x) -> None:
    """Checks ids in memory before anything is run."""
    check_token_ids(x, model.backbone.config.vocabulary_size)


def _texts(x: Mapping) -> dict:
    """A mapping of texts as a dict; arrays of strings become lists, bytes become strings."""

    def text(column):
        if isinstance(column, np.ndarray):
            column = column.tolist()
        if isinstance(column, list):
            return [entry.decode() if isinstance(entry, bytes) else entry for entry in column]
        return column

    return {name: text(column) for name, column in x.items()}


def _is_single_text(column) -> bool:
    return isinstance(column, (str, bytes)) or tuple(getattr(column, "shape", (1,))) == ()


def _on_a_device(x: Mapping) -> bool:
    """Whether arrays are on an accelerator or in other processes, so that checking them would cost a transfer."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    for value in x.values():
        if torch is not None and isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return True
        if jax is not None and isinstance(value, jax.Array):
            local = value.is_fully_addressable
            return not local or any(device.platform != "cpu" for device in value.devices())
    return False
