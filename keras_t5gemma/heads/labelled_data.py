"""`FitsLabelled`: `fit`, `evaluate` and `predict` of classifiers on all data that `keras.Model` accepts."""

import sys
from collections.abc import Callable, Mapping

import keras
import numpy as np

from keras_t5gemma.checks import check_finite
from keras_t5gemma.heads.targets import warn_of_nothing_to_learn
from keras_t5gemma.text.tokenizer import loaded_tensorflow
from keras_t5gemma.training.batches.arrays import check_range, described, to_numpy, to_rows
from keras_t5gemma.training.batches.fitting import Fits, steps_for_keras, warnings_suppressed, with_nones
from keras_t5gemma.training.batches.sources import BatchSource
from keras_t5gemma.training.batches.stream_callback import StreamCallback, with_callback

IDS, MASK = "token_ids", "padding_mask"
# Columns of padding alone are cut off, down to a multiple of this. It bounds the number of shapes, and so of programs.
_WIDTH_STEP = 32


class FitsLabelled(Fits):
    """Mixed into a classifier that has a `backbone`, perhaps a `preprocessor`, and the methods `targets` and `columns`.

    Rows in memory become arrays at once: x is what the preprocessor takes (a list of texts, a tuple of lists for
    pairs), or a dict of `token_ids` and, optionally, `padding_mask` [B, S]. Anything else is batches of these: x,
    (x, y) or (x, y, sample_weight) of a `tf.data.Dataset`, a Grain dataset, a `PyDataset`, a `DataLoader` or a
    generator.
    """

    def fit(
        self,
        x=None,
        y=None,
        batch_size: int | None = None,
        sample_weight=None,
        validation_data=None,
        *,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        callbacks: list[keras.callbacks.Callback] | keras.callbacks.Callback | None = None,
        **kwargs,
    ) -> keras.callbacks.History:
        """Trains, as `keras.Model.fit` does.

        Args:
            x: in memory, what the preprocessor takes: a list or an array of texts, or a tuple of these for pairs; a
                dict of `token_ids` and `padding_mask`; or a `datasets.Dataset` with the columns `text` and `label`. Or
                batches x, (x, y) or (x, y, sample_weight) of these, in any form of dataset that Keras reads.
            y: labels: ids, or names if the model has `labels`; see the class for the forms of each problem.
            batch_size: rows per step, for rows in memory; 32 if None.
            sample_weight: [B], one per row, or None.
            validation_data: (x, y) or (x, y, sample_weight), or a dataset of batches.
            epochs: how often to read the data.
            steps_per_epoch: batches per epoch; all if None.
            validation_steps: batches of `validation_data` per validation; all if None.
            callbacks: `keras.callbacks.Callback`s.
            **kwargs: further arguments of `keras.Model.fit`, such as `shuffle`, `validation_split`, `class_weight` and
                `verbose`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: if texts, ids or labels are invalid; the message names the row, the value and what is valid.
        """
        x, y = _columns_of_dataset(x, y)
        if validation_data is not None:
            validation = with_nones(validation_data)
            validation = (*_columns_of_dataset(*validation[:2]), validation[2])
            if _in_memory(validation[0]):
                validation_data = self._arrays_in_memory(*validation, needs_labels=True)
                stream = None
            else:
                batches = BatchSource(validation[0], steps_name="validation_steps").batches(
                    self._to_arrays(), steps=validation_steps, passes=epochs, unpack=self._unpacked
                )
                validation_data, stream = batches.dataset, batches.stream
                validation_steps = steps_for_keras(validation_steps, batches.steps, stream)
            kwargs |= {"validation_data": validation_data, "validation_steps": validation_steps}
        if _in_memory(x):
            x, y, sample_weight = self._arrays_in_memory(x, y, sample_weight, needs_labels=True)
            warn_of_nothing_to_learn(y, sample_weight)
            kwargs |= {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch}
            callbacks = callbacks if validation_data is None or stream is None else _with_stream(callbacks, stream)
            return self._by_keras(
                "fit", x, y, sample_weight=sample_weight, epochs=epochs, callbacks=callbacks, **kwargs
            )
        source = BatchSource(x, y, sample_weight, batch_size=batch_size, steps_name="steps_per_epoch")
        batches = source.batches(self._to_arrays(), steps=steps_per_epoch, passes=epochs, unpack=self._unpacked)
        callback = StreamCallback(batches.stream, steps_per_epoch)
        if validation_data is not None:
            callback.validation_stream = stream
        with warnings_suppressed():
            return self._by_keras(
                "fit",
                batches.dataset,
                epochs=epochs,
                steps_per_epoch=steps_for_keras(steps_per_epoch, batches.steps, batches.stream),
                callbacks=with_callback(callbacks, callback),
                **{**kwargs, "shuffle": False},  # a dataset has its own order, and Keras would warn of it
            )

    def evaluate(self, x=None, y=None, batch_size: int | None = None, sample_weight=None, **kwargs):
        """The loss and the metrics of data, as `keras.Model.evaluate` returns them; arguments as for `fit`."""
        if kwargs.get("_use_cached_eval_dataset", False):  # from within `fit`
            return self._by_keras("evaluate", x, y, batch_size, sample_weight=sample_weight, **kwargs)
        x, y = _columns_of_dataset(x, y)
        if _in_memory(x):
            x, y, sample_weight = self._arrays_in_memory(x, y, sample_weight, needs_labels=True)
            return self._by_keras("evaluate", x, y, batch_size, sample_weight=sample_weight, **kwargs)
        return self._on_batches("evaluate", BatchSource(x, y, sample_weight, batch_size=batch_size), **kwargs)

    def predict(self, x=None, batch_size: int | None = None, **kwargs) -> np.ndarray:
        """The logits of data, as `keras.Model.predict` returns them; `classify` returns names or ids of classes."""
        x, _ = _columns_of_dataset(x, None)
        if _in_memory(x):
            x, _, _ = self._arrays_in_memory(x, None, None)
            return self._by_keras("predict", x, batch_size, **kwargs)
        return self._on_batches("predict", BatchSource(x, batch_size=batch_size), **kwargs)

    def _on_batches(self, name: str, source: BatchSource, *, steps: int | None = None, callbacks=None, **kwargs):
        batches = source.batches(self._to_arrays(), steps=steps, unpack=self._unpacked)
        with warnings_suppressed():
            return self._by_keras(
                name,
                batches.dataset,
                steps=steps_for_keras(steps, batches.steps, batches.stream),
                callbacks=_with_stream(callbacks, batches.stream),
                **kwargs,
            )

    def _unpacked(self, batch) -> tuple:
        """`(x, y, sample_weight)` of a batch: x; or (x, y) or (x, y, sample_weight), as a tuple or a list.

        A list of words in lists is x: labels of words come in a tuple (x, y). A tuple of texts, as PyTorch's
        `DataLoader` makes it of a list, is a batch of texts rather than one pair.
        """
        is_list = isinstance(batch, list) and not self.labels_each_position and not isinstance(batch[0], (str, bytes))
        is_parts = (isinstance(batch, tuple) or is_list) and 1 <= len(batch) <= 3
        parts = tuple(batch) if is_parts else (batch,)
        if isinstance(parts[0], tuple) and all(isinstance(text, (str, bytes)) for text in parts[0]):
            parts = (list(parts[0]), *parts[1:])
        return parts + (None,) * (3 - len(parts))

    def _arrays_in_memory(self, x, y, sample_weight, needs_labels: bool = False) -> tuple:
        """All rows as arrays, without columns that hold padding alone."""
        if needs_labels and y is None:
            raise ValueError("`y` must hold the labels of the rows of x. Received: y=None.")
        inputs, y, sample_weight = self._to_arrays()(x, y, sample_weight)
        if not isinstance(inputs, Mapping) or np.ndim(inputs[IDS]) != 2:
            raise ValueError("x is a single text, and must be a batch of texts: a list, or a tuple of lists for pairs.")
        for name, column in (("y", y), ("sample_weight", sample_weight)):
            if column is not None and len(column) != len(inputs[IDS]):
                raise ValueError(f"`{name}` must have one row per text, {len(inputs[IDS])}. Received: {len(column)}.")
        width = self._width(inputs)
        if self.labels_each_position:
            y = None if y is None else y[:, :width]
            sample_weight = sample_weight[:, :width] if np.ndim(sample_weight) == 2 else sample_weight
        return {name: array[:, :width] for name, array in inputs.items()}, y, sample_weight

    def _width(self, inputs: dict) -> int:
        """The columns to keep: a column of padding stays, which pooling of the decoder reads."""
        used = np.flatnonzero(inputs[MASK].any(axis=0))
        needed = 2 + (int(used[-1]) if used.size else 0)
        return min(inputs[MASK].shape[1], -(-needed // _WIDTH_STEP) * _WIDTH_STEP)

    def _to_arrays(self, for_devices: bool = False) -> Callable:
        """The function `(x, y, sample_weight) -> (x, y, sample_weight)` from a batch to the model's arrays."""
        del for_devices

        def to_arrays(x, y=None, sample_weight=None):
            has_ids = isinstance(x, Mapping) and IDS in x
            if has_ids:
                inputs = x if _is_symbolic(x[IDS]) else self._checked_ids(x)
            elif self.preprocessor is None:
                raise ValueError(
                    f"A model without a preprocessor takes x={{'{IDS}': [B, S], '{MASK}': [B, S]}}. Received: "
                    f"{described(x)}."
                )
            else:
                inputs, y, sample_weight = self.columns(x, y, sample_weight)
            if y is not None:
                y = _converted(self.targets, y)
            if sample_weight is not None and not _is_symbolic(sample_weight):
                sample_weight = np.asarray(to_numpy(sample_weight), "float32")
                check_finite(sample_weight)
            return inputs, y, sample_weight

        return to_arrays

    def _checked_ids(self, x: Mapping) -> dict[str, np.ndarray]:
        """`token_ids` and `padding_mask` as int32; a missing mask is 1 at ids that are not 0."""
        if unknown := sorted(set(x) - {IDS, MASK}):
            raise ValueError(f"x may hold '{IDS}' and '{MASK}'. Received: {unknown}.")
        ids = to_rows(IDS, x[IDS], 0)
        check_range(IDS, ids, self.backbone.config.vocabulary_size)
        mask = (ids != 0).astype("int32") if x.get(MASK) is None else to_rows(MASK, x[MASK], 0)
        if mask.shape != ids.shape:
            raise ValueError(f"`{MASK}` must have the shape of `{IDS}`, {ids.shape}. Received: {mask.shape}.")
        return {IDS: ids, MASK: mask}


def _converted(convert: Callable, y):
    """`convert(y)`, in a `tf.data` pipeline as an operation of its graph."""
    if not _is_symbolic(y):
        return convert(y if isinstance(y, (list, tuple)) else to_numpy(y))
    tf = loaded_tensorflow()
    shape, is_float = y.shape, y.dtype.is_floating
    # The dtype of the result depends on the problem, as for these zeros.
    result = convert(np.zeros([size or 1 for size in shape], "float32" if is_float else "int32"))
    tensor = tf.numpy_function(convert, [y], result.dtype, stateful=False)
    tensor.set_shape([None, *result.shape[1:]] if shape.rank else [])
    return tensor


def _is_symbolic(value) -> bool:
    tf = loaded_tensorflow()
    return tf is not None and tf.is_symbolic_tensor(value)


def _in_memory(x) -> bool:
    """Whether x is rows in memory rather than a dataset of batches."""
    return isinstance(x, (list, tuple, str, bytes, Mapping)) or (hasattr(x, "shape") and hasattr(x, "dtype"))


def _columns_of_dataset(x, y) -> tuple:
    """The columns of a Hugging Face `datasets.Dataset`: `text` (or `words`) and `label` (or `labels`)."""
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(x, datasets.Dataset):
        return x, y
    texts = next((name for name in ("text", "words", "tokens") if name in x.column_names), None)
    labels = next((name for name in ("label", "labels", "ner_tags") if name in x.column_names), None)
    if texts is None:
        raise ValueError(f"A datasets.Dataset must have the column 'text' or 'words'. Received: {x.column_names}.")
    return list(x[texts]), y if labels is None or y is not None else list(x[labels])


def _with_stream(callbacks, stream) -> list:
    return with_callback(callbacks, StreamCallback(stream))
