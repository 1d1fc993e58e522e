"""`fit`, `evaluate` and `predict` on everything that `keras.Model` takes, texts or token ids."""

import contextlib
import sys
import warnings
from collections.abc import Mapping

import keras
import numpy as np

from keras_t5gemma._keras_internals import RestoresTrainingState, begin_with_epoch, tensor_of
from keras_t5gemma.checks import check_token_ids
from keras_t5gemma.concurrency import changing
from keras_t5gemma.kernels.device import devices_of_a_batch
from keras_t5gemma.training.batches.arrays import FORM, INPUT_NAMES, TEXT_NAMES, BatchArrays, described, renamed
from keras_t5gemma.training.batches.graph import in_graph
from keras_t5gemma.training.batches.rows import split_rows
from keras_t5gemma.training.batches.sources import BatchSource
from keras_t5gemma.training.losses.cross_entropy import VocabularyCrossEntropy

# Keras's warning at the end of data without a length, and PyTorch's of how Keras transposes the scales of int8.
_UNSAID = ("Your input ran out of data", "The use of `x.T` on tensors of dimension other than 2")


class Fits(RestoresTrainingState):
    """Mixed into a keras-hub task that has a T5Gemma `backbone` and perhaps a `preprocessor`.

    keras-hub's own `fit` takes arrays, `tf.data` and Grain; here each kind of data becomes one kind of batches, which
    are checked on the host as they come.
    """

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        validation_data=None,
        validation_split=0.0,
        *,
        shuffle=True,
        epochs=1,
        steps_per_epoch=None,
        validation_steps=None,
        validation_batch_size=None,
        callbacks=None,
        class_weight=None,
        **kwargs,
    ):
        """Trains, as `keras.Model.fit` does.

        Args:
            x: in memory, a dict of B rows: of texts (or conversations), `encoder_text` and `decoder_text`; or of token
                ids, `encoder_token_ids` and `decoder_token_ids`, arrays or lists of rows of any length, with or without
                `encoder_padding_mask` and `decoder_padding_mask`; or Hugging Face's `input_ids`, `attention_mask` and
                `labels`, such as a `BatchEncoding`; or a `datasets.Dataset` with such columns. Or batches of any of
                these, x, (x, y) or (x, y, sample_weight): a `pretraining_dataset` or another Grain dataset, a
                `tf.data.Dataset`, a `keras.utils.PyDataset`, a `torch.utils.data.DataLoader`, a generator.
            y: labels for token ids, [B, T], -100 at positions without one. If None, the decoder's ids moved one to the
                left. Of texts the preprocessor makes them.
            batch_size: rows per step, for rows in memory; 32 if None.
            sample_weight: [B], one per row; or, for token ids, [B, T], of each label. If None, labels count that are
                neither -100 nor `<pad>`, at positions of the decoder that are not padding.
            validation_data: as x, or a tuple of x, y and weights.
            validation_split: the last rows of a dict, as a fraction, to validate on instead.
            shuffle: whether rows in memory come in another order each epoch; a dataset has its own.
            epochs: how often to go through the data, or through `steps_per_epoch` batches.
            steps_per_epoch: batches of an epoch; all if None. Data without end need it, and so does a generator that is
                gone through more than once.
            validation_steps: likewise, of `validation_data`.
            validation_batch_size: rows of a batch of `validation_data`; `batch_size` if None.
            callbacks: `keras.callbacks.Callback`s.
            class_weight: must be None.
            **kwargs: what `keras.Model.fit` takes besides.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: if the data have another form, never end, or hold ids outside the vocabulary or shapes that do
                not fit; if the model is not compiled.
        """
        if class_weight is not None:
            raise ValueError(
                "`class_weight` must be None: a label is a token here. Use `sample_weight`, [B] or [B, T]."
            )
        _check_whole(self, x)
        _check_counted(x, callbacks)
        if validation_split and validation_data is None:
            if not isinstance(x, Mapping):
                raise ValueError(
                    f"`validation_split` needs a dict of rows in memory; pass `validation_data`. Received: x of "
                    f"{described(x)}."
                )
            (x, y, sample_weight), validation_data = split_rows(x, y, sample_weight, validation_split)
        source = BatchSource(x, y, sample_weight, batch_size=batch_size, shuffle=shuffle, steps_name="steps_per_epoch")
        to_arrays = self._to_arrays(for_devices=True)
        batches = source.batches(to_arrays, steps=steps_per_epoch, passes=epochs)
        feeding = _Feeding(batches.stream, steps_per_epoch)
        if validation_data is not None:
            parts = _parts(validation_data)
            if isinstance(parts[0], Mapping):
                _check_whole(self, parts[0])
            size = validation_batch_size or batch_size if _has_rows(parts[0]) else None
            held_out = BatchSource(*parts, batch_size=size, steps_name="validation_steps")
            held_out = held_out.batches(to_arrays, steps=validation_steps, passes=epochs)
            validation_data, feeding.validation_stream = held_out.dataset, held_out.stream
            validation_steps = _fewest(validation_steps, held_out.steps, held_out.stream)
        with _keras_unsaid():
            return self._by_keras(
                "fit",
                batches.dataset,
                validation_data=validation_data,
                shuffle=False,
                epochs=epochs,
                steps_per_epoch=_fewest(steps_per_epoch, batches.steps, batches.stream),
                validation_steps=validation_steps,
                callbacks=_with(callbacks, feeding),
                **kwargs,
            )

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, *, steps=None, callbacks=None, **kwargs):
        """The loss and the metrics of data, as `keras.Model.evaluate` gives them; arguments as for `fit`.

        Loss and accuracy are means over all target tokens, however they lie in batches.
        """
        if kwargs.get("_use_cached_eval_dataset", False):  # from within `fit`
            return self._by_keras(
                "evaluate", x, y, batch_size, sample_weight=sample_weight, steps=steps, callbacks=callbacks, **kwargs
            )
        _check_whole(self, x)
        batches = BatchSource(x, y, sample_weight, batch_size=batch_size).batches(
            self._to_arrays(for_devices=True), steps=steps
        )
        with _keras_unsaid():
            return self._by_keras(
                "evaluate",
                batches.dataset,
                steps=_fewest(steps, batches.steps, batches.stream),
                callbacks=_with(callbacks, _Feeding(batches.stream)),
                **kwargs,
            )

    def predict(self, x=None, batch_size=None, *, steps=None, callbacks=None, **kwargs):
        """The logits [B, T, V], as `keras.Model.predict` gives them; x as for `fit`."""
        _check_whole(self, x)
        batches = BatchSource(x, batch_size=batch_size).batches(self._to_arrays(), steps=steps)
        with _keras_unsaid():
            return self._by_keras(
                "predict",
                batches.dataset,
                steps=_fewest(steps, batches.steps, batches.stream),
                callbacks=_with(callbacks, _Feeding(batches.stream)),
                **kwargs,
            )

    def train_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """One training step, as `keras.Model.train_on_batch` does it; a batch as for `fit`."""
        return self._on_batch("train_on_batch", x, y, sample_weight, **kwargs)

    def test_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """The loss and the metrics of a batch, as `keras.Model.test_on_batch` gives them; a batch as for `fit`."""
        return self._on_batch("test_on_batch", x, y, sample_weight, **kwargs)

    def _on_batch(self, name, x, y, sample_weight, **kwargs):
        # Not keras-hub's, which would make one tensor of labels that come with a teacher's view.
        batch = self.preprocess_samples(x, y, sample_weight)
        return self._by_keras(name, *map(_tensors, batch), **kwargs)

    def _by_keras(self, name, *args, **kwargs):
        """Keras's own method of that name, in its turn as in `Guarded`; keras-hub's would make other batches."""
        with changing(self, name):
            try:
                return getattr(keras.Model, name)(self, *args, **kwargs)
            except BaseException:
                # Data may hold an error in any batch.
                self._restore_training_state()
                raise
            finally:
                self._give_back = None

    def preprocess_samples(self, x, y=None, sample_weight=None):
        """`(x, y, sample_weight)` as the model takes them: texts through the preprocessor, token ids checked."""
        return self._to_arrays()(x, y, sample_weight)

    def _to_arrays(self, for_devices=False):
        """What makes the model's arrays of a batch, perhaps with as many rows as can be spread over the devices."""
        any_targets = not isinstance(getattr(self, "loss", None), VocabularyCrossEntropy)
        multiple = devices_of_a_batch()[1] if for_devices else 1
        arrays = BatchArrays(self.backbone.config.vocabulary_size, any_targets, multiple)
        preprocessor = self.preprocessor

        def to_arrays(x, y=None, sample_weight=None):
            if not (isinstance(x, Mapping) and {"encoder_token_ids", "input_ids"} & set(x)):
                if preprocessor is None:
                    renamed(x)  # an error that shows the form
                if not (isinstance(x, Mapping) and set(TEXT_NAMES) & set(x)):
                    raise ValueError(f"{FORM} Received: x={described(x)}.")
                if alone := [name for name in TEXT_NAMES if name in x and _is_one_text(x[name])]:
                    raise ValueError(f"`{alone[0]}` is a single text, and must be a batch of them. {FORM}")
                x, y, sample_weight = preprocessor.call(_texts(x), y=y, sample_weight=sample_weight)
                if multiple == 1:
                    return x, y, sample_weight
            if y is not None and set(INPUT_NAMES) <= set(x) and _on_a_device(x):
                return x, y, sample_weight
            return in_graph(arrays, x, y, sample_weight)

        return to_arrays


class _Feeding(keras.callbacks.Callback):
    """Says when reading begins, and when an epoch was shorter than asked for."""

    def __init__(self, stream, steps=None):
        super().__init__()
        self.stream, self.validation_stream = stream, None
        self._steps, self._done = steps, 0

    def on_train_begin(self, logs=None):  # noqa: ARG002
        _begin(self.stream)

    def on_test_begin(self, logs=None):  # noqa: ARG002
        _begin(self.stream)
        _begin(self.validation_stream)

    def on_predict_begin(self, logs=None):  # noqa: ARG002
        _begin(self.stream)

    def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002
        self._done = 0
        # Where `BackupAndRestore` had this `fit` begin, and Keras would have each later one begin, too.
        begin_with_epoch(self._model, None)

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
        self._done = batch + 1

    def on_epoch_end(self, epoch, logs=None):  # noqa: ARG002
        if self._steps is not None and self._done < self._steps and not self.model.stop_training:
            warnings.warn(
                f"The data ended after {self._done} of {self._steps} steps of epoch {epoch + 1}, which ends there. Use "
                f"data that go on, or `steps_per_epoch={self._done}` or less.",
                stacklevel=2,
            )
            self._steps = None


def _tensors(part):
    """A part of a batch: None, an array or a list of numbers, or a mapping of such."""
    if isinstance(part, Mapping):
        return {name: _tensors(value) for name, value in part.items()}
    return None if part is None else tensor_of(part)


def _begin(stream):
    if stream is not None:
        stream.begin()


@contextlib.contextmanager
def _keras_unsaid():
    """Without Keras's warning at the end of each dataset whose length it does not know, and what it has PyTorch say."""
    filters = list(warnings.filters)
    for message in _UNSAID:
        warnings.filterwarnings("ignore", message=message)
    ours = [entry for entry in warnings.filters if entry not in filters]
    try:
        yield
    finally:
        # Only those: callbacks may have set others meanwhile.
        for entry in ours:
            if entry in warnings.filters:
                warnings.filters.remove(entry)


def _with(callbacks, feeding):
    """Callbacks, a list, one or a `CallbackList`, with one more."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.append(feeding)
        return callbacks
    callbacks = [] if callbacks is None else callbacks
    return [*(callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]), feeding]


def _check_counted(x, callbacks):
    """Refuses the data of a `TrainingCheckpoint` that would save nothing."""
    callback = getattr(x, "callback", None)
    listed = getattr(callbacks, "callbacks", callbacks) or []  # of a `CallbackList`
    if callback is not None and callback() not in (listed if isinstance(listed, (list, tuple)) else [listed]):
        raise ValueError(
            "`callbacks` must have the TrainingCheckpoint that these data are from: without it nothing is saved."
        )


def _fewest(asked, known, stream):
    """The steps that Keras is told: those asked for, of data that are gone through once no more than there are."""
    if asked is None or known is None or stream is not None:
        return known if asked is None else asked
    return min(asked, known)


def _parts(data):
    """`(x, y, sample_weight)` of `validation_data`."""
    parts = data if isinstance(data, (tuple, list)) else (data,)
    return tuple(parts) + (None,) * (3 - len(parts))


def _has_rows(x):
    """Whether x is rows, to be put into batches."""
    datasets = sys.modules.get("datasets")
    return isinstance(x, Mapping) or (
        datasets is not None and isinstance(x, (datasets.Dataset, datasets.IterableDataset))
    )


def _check_whole(model, x):
    """Ids in memory, before anything is run."""
    check_token_ids(x, model.backbone.config.vocabulary_size)


def _texts(x):
    """A mapping of texts as a dict; arrays of strings and bytes as lists."""

    def text(column):
        if isinstance(column, np.ndarray):
            column = column.tolist()
        if isinstance(column, list):
            return [entry.decode() if isinstance(entry, bytes) else entry for entry in column]
        return column

    return {name: text(column) for name, column in x.items()}


def _is_one_text(column):
    return isinstance(column, (str, bytes)) or tuple(getattr(column, "shape", (1,))) == ()


def _on_a_device(x):
    """Whether arrays are on an accelerator or in other processes, from where it would cost time to look at them."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    for value in x.values():
        if torch is not None and isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return True
        if jax is not None and isinstance(value, jax.Array):
            local = value.is_fully_addressable
            return not local or any(device.platform != "cpu" for device in value.devices())
    return False
