"""Checks and pads batches with several answers per prompt, for an `AnswerLoss`."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_t5gemma.checks import check_finite
from keras_t5gemma.data.pipelines.teacher_view import LABELS
from keras_t5gemma.training.batches.arrays import INPUT_NAMES, described, to_numpy
from keras_t5gemma.training.losses.answers import AnswerLoss
from keras_t5gemma.training.losses.labels import IGNORED_LABEL


class AnswerArrays:
    """Checks batches for an `AnswerLoss`, and rounds their number of rows up.

    Args:
        loss: the loss.
        vocabulary_size: V.
        multiple: the number of prompts is rounded up to a multiple of this, by prompts of weight 0; for batches that
            are divided over devices.
    """

    def __init__(self, loss: AnswerLoss, vocabulary_size: int, multiple: int = 1):
        self.loss, self.vocabulary_size, self.multiple = loss, vocabulary_size, multiple

    def __call__(self, x: Mapping, y: Any = None, sample_weight: Any = None) -> tuple:
        """Converts one batch.

        Args:
            x: the four inputs: of the encoder [B, S], of the decoder [B, A, T].
            y: a dict of `labels` [B, A, T] and the other arrays [B, ...] of the loss.
            sample_weight: [B], or None for equal weights.

        Returns:
            `(x, y, sample_weight)`: numpy arrays, labels -100 where there is none, weights float32 [B].

        Raises:
            ValueError: if a batch has another form, an id is outside the vocabulary, or a weight is not finite.
        """
        if not (isinstance(x, Mapping) and set(x) == set(INPUT_NAMES) and isinstance(y, Mapping) and LABELS in y):
            raise self._other_form(f"x={described(x)}, y={described(y)}")
        x = {name: self._integers(name, x[name]) for name in INPUT_NAMES}
        y = {name: to_numpy(value) for name, value in y.items()} | {LABELS: self._integers(LABELS, y[LABELS])}
        encoder, decoder = x["encoder_token_ids"].shape, x["decoder_token_ids"].shape
        expected = {"encoder_padding_mask": encoder, "decoder_padding_mask": decoder, LABELS: decoder}
        shapes = {name: array.shape for name, array in {**x, LABELS: y[LABELS]}.items()}
        if len(encoder) != 2 or len(decoder) != 3 or any(shapes[name] != shape for name, shape in expected.items()):
            raise self._other_form(f"shapes {shapes}")
        if unequal := [name for name, array in {**x, **y}.items() if not array.ndim or len(array) != encoder[0]]:
            raise self._other_form(f"{unequal[0]} with other than {encoder[0]} rows")
        labels = np.where(x["decoder_padding_mask"] > 0, y[LABELS], IGNORED_LABEL)
        to_check = {name: x[name] for name in ("encoder_token_ids", "decoder_token_ids")}
        for name, ids in (to_check | {LABELS: labels[labels != IGNORED_LABEL]}).items():
            if ids.size and not (ids.min() >= 0 and ids.max() < self.vocabulary_size):
                wrong = ids.max() if ids.max() >= self.vocabulary_size else ids.min()
                raise ValueError(
                    f"`{name}` must be in [0, {self.vocabulary_size}), the backbone's vocabulary. Received: {wrong}."
                )
        y = {**y, LABELS: labels}
        self.loss.check_batch(x, y)
        return self._with_rows_added(x, y, self._weights(sample_weight, encoder[0]))

    def _other_form(self, received: str) -> ValueError:
        source = f", such as `{self.loss.batches_from}` makes" if self.loss.batches_from else ""
        return ValueError(
            f"`{type(self.loss).__name__}` takes batches (x, y, sample_weight){source}: x with token ids and masks of "
            f"the encoder [B, S] and of the decoder [B, A, T], y with labels [B, A, T], weights [B]. To train or to "
            f"evaluate on other data, `compile` with another loss. Received: {received}."
        )

    def _integers(self, name: str, value: Any) -> np.ndarray:
        if keras.backend.is_keras_tensor(value) or _is_symbolic(value):
            raise self._other_form("tensors of a `tf.data` graph; pass the Grain dataset itself")
        array = to_numpy(value)
        if array is None or array.dtype.kind not in "iub":
            raise self._other_form(f"{name}={described(value)}")
        return array.astype("int32", copy=False)

    def _weights(self, sample_weight: Any, rows: int) -> np.ndarray:
        if sample_weight is None:
            return np.ones(rows, "float32")
        weights = to_numpy(sample_weight)
        if weights is None or weights.dtype.kind not in "iubf" or weights.shape != (rows,):
            raise ValueError(f"`sample_weight` must be [B], one per prompt. Received: {described(sample_weight)}.")
        weights = weights.astype("float32")
        check_finite(weights)
        return weights

    def _with_rows_added(self, x: dict, y: dict, weights: np.ndarray) -> tuple:
        """Adds copies of the last prompt, with weight 0, up to a multiple of `multiple`."""
        added = -len(weights) % self.multiple
        if added:
            x, y = keras.tree.map_structure(lambda a: np.concatenate([a, np.repeat(a[-1:], added, axis=0)]), (x, y))
            weights = np.concatenate([weights, np.zeros(added, "float32")])
        return x, y, weights


def _is_symbolic(value: Any) -> bool:
    """Whether a value is a tensor of a TensorFlow graph."""
    return hasattr(value, "graph") and not hasattr(value, "numpy")
