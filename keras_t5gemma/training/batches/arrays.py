"""Converts a batch of token ids, in any form that users and libraries write, to the model's arrays."""

import re
import sys
from collections.abc import Mapping

import keras
import numpy as np

from keras_t5gemma.checks import check_finite
from keras_t5gemma.config import BOS_ID, PAD_ID
from keras_t5gemma.training.losses.labels import IGNORED_LABEL

INPUT_NAMES = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")
TEXT_NAMES = ("encoder_text", "decoder_text")
LABELS = "labels"
# Hugging Face's names of the same arrays.
HUGGING_FACE_NAMES = {
    "input_ids": "encoder_token_ids",
    "attention_mask": "encoder_padding_mask",
    "decoder_input_ids": "decoder_token_ids",
    "decoder_attention_mask": "decoder_padding_mask",
    LABELS: LABELS,
}
FORM = (
    'A batch must be x, (x,), (x, y) or (x, y, sample_weight), with x={"encoder_text": ..., "decoder_text": ...} for a '
    'model with a preprocessor, or x={"encoder_token_ids": [B, S], "decoder_token_ids": [B, T]} with, optionally, '
    '"encoder_padding_mask", "decoder_padding_mask" and y=labels [B, T]; or Hugging Face\'s {"input_ids", '
    '"attention_mask", "labels"}.'
)


def unpacked(batch) -> tuple:
    """`(x, y, sample_weight)` of a batch: a mapping x, or a tuple or list of one to three items, the first a mapping.

    Raises:
        ValueError: if the batch has another form.
    """
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], Mapping):
        raise ValueError(f"{FORM} Received: {described(batch)}.")
    return parts + (None,) * (3 - len(parts))


def renamed(x: Mapping) -> dict:
    """A mapping of token ids as a dict under this package's names, with `labels` if it has them.

    Raises:
        ValueError: if the mapping has no token ids of the encoder, or unknown keys.
    """
    names = HUGGING_FACE_NAMES if isinstance(x, Mapping) and "input_ids" in x else {}
    allowed = set(names) or {*INPUT_NAMES, LABELS}
    if not isinstance(x, Mapping) or not {"input_ids", "encoder_token_ids"} & set(x) or set(x) - allowed:
        raise ValueError(f"{FORM} Received: x={described(x)}.")
    return {names.get(name, name): value for name, value in x.items()}


def described(value) -> str:
    """A description of a value for an error message: keys, or type and shape."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        parts = ", ".join(described(part) for part in value[:3])
        return f"a {type(value).__name__} of {len(value)}: {parts}{', ...' if len(value) > 3 else ''}"
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")


class BatchArrays:
    """Converts batches of token ids to the model's arrays.

        x   encoder_token_ids  [[5, 6, 7], [8]]             encoder_token_ids     5 6 7   8 0 0
            labels             [[11, 12, 1], [13, 1]]       encoder_padding_mask  1 1 1   1 0 0
                                                            decoder_token_ids     2 11 12   2 13 1
                                                            decoder_padding_mask  1 1 1   1 1 1
                                                            labels                11 12 1   13 1 0
                                                            weights               1 1 1   1 1 0

    - Rows of unequal length are padded: ids, masks and weights with 0, labels with -100.
    - A missing mask is 1 at ids that are not `<pad>`, 0.
    - Missing decoder ids are the labels moved one to the right after `<bos>`, -100 as `<pad>`, as in `transformers`.
    - Missing labels are the decoder's ids moved one to the left, within each segment.
    - Missing weights are 1 at tokens of the decoder whose label is neither -100 nor `<pad>`. Weights [B], one per row,
      are multiplied with these.
    - A label of weight 0 does not count and becomes 0.

    Args:
        vocabulary_size: V.
        any_targets: whether y may be something other than labels [B, T], for a loss of the user's own.
        multiple: the number of rows is rounded up to a multiple of this, by rows of weight 0; for batches that are
            sharded over devices.
    """

    def __init__(self, vocabulary_size: int, any_targets: bool = False, multiple: int = 1):
        self.vocabulary_size = vocabulary_size
        self.any_targets = any_targets
        self.multiple = multiple

    def __call__(self, x: Mapping, y=None, sample_weight=None) -> tuple:
        """Converts one batch.

        Args:
            x: a mapping with token ids.
            y: labels; a dict with labels, as in a `distillation_dataset`; or None.
            sample_weight: [B, T], [B], or None.

        Returns:
            `(x, y, sample_weight)`: a dict of the four inputs, int32; labels [B, T], int32; weights [B, T], float32.

        Raises:
            ValueError: if a key is unknown, a shape does not match, or an id is outside the vocabulary. The message
                names the argument, the value or shape, and a valid one.
        """
        try:
            return self._arrays(renamed(x), y, sample_weight)
        except ValueError as error:
            if not isinstance(x, Mapping) or "input_ids" not in x:
                raise
            names = {ours: theirs for theirs, ours in HUGGING_FACE_NAMES.items()} | (
                {"y": LABELS} if LABELS in x else {}
            )
            raise ValueError(re.sub(r"`(\w+)`", lambda name: f"`{names.get(name[1], name[1])}`", str(error))) from None

    def _arrays(self, x: dict, y, sample_weight) -> tuple:
        """Converts one batch under this package's names; arguments and result as for a call."""
        x_labels, rest = x.pop(LABELS, None), None
        if x_labels is not None and y is not None:
            raise ValueError('Labels are given twice, as y and as x["labels"]: pass one of them.')
        y = x_labels if y is None else y
        if isinstance(y, Mapping):
            y, rest = y.get(LABELS), y
        if self.any_targets and y is not None and not _may_be_labels(y):
            return self._inputs(x, None), y if rest is None else rest, sample_weight
        labels = None if y is None else to_rows("y", y, IGNORED_LABEL)
        inputs = self._inputs(x, labels)
        labels, weights = self._targets(inputs, labels, sample_weight)
        if rest is not None:
            labels = {**rest, LABELS: labels}
        return self._with_rows_added(inputs, labels, weights)

    def _inputs(self, x: dict, labels: np.ndarray | None) -> dict[str, np.ndarray]:
        """The model's four inputs, checked; missing masks follow from the pad id, missing decoder ids from labels."""
        if x.get("decoder_token_ids") is None:
            if labels is None:
                raise ValueError(
                    f"The decoder needs `decoder_token_ids`, or labels to make them of. {FORM} Received: "
                    f"x={described(x)}."
                )
            ids = np.where(labels == IGNORED_LABEL, PAD_ID, labels)
            check_range(LABELS, ids, self.vocabulary_size, ", or -100")
            x = {**x, "decoder_token_ids": np.concatenate([np.full_like(ids[:, :1], BOS_ID), ids[:, :-1]], 1)}
        inputs = {}
        for side in ("encoder", "decoder"):
            name, mask_name = f"{side}_token_ids", f"{side}_padding_mask"
            ids = to_rows(name, x[name], PAD_ID)
            check_range(name, ids, self.vocabulary_size)
            mask = x.get(mask_name)
            mask = (ids != PAD_ID).astype("int32") if mask is None else to_rows(mask_name, mask, 0)
            if mask.shape != ids.shape:
                raise ValueError(f"`{mask_name}` must have the shape of `{name}`, {ids.shape}. Received: {mask.shape}.")
            inputs |= {name: ids, mask_name: mask}
        rows = [len(inputs[name]) for name in ("encoder_token_ids", "decoder_token_ids")]
        if rows[0] != rows[1]:
            raise ValueError(
                f"`decoder_token_ids` must have as many rows as `encoder_token_ids`, {rows[0]}. Received: {rows[1]}."
            )
        return inputs

    def _targets(
        self, inputs: dict[str, np.ndarray], labels: np.ndarray | None, weights
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels and weights [B, T]; missing labels are the decoder's ids moved one to the left.

        Args:
            inputs: the model's four inputs.
            labels: int [B, T], or None.
            weights: the user's, [B, T], [B], or None.
        """
        ids, mask = inputs["decoder_token_ids"], inputs["decoder_padding_mask"]
        if labels is None:
            same = (mask[:, 1:] != 0) & (mask[:, 1:] == mask[:, :-1])
            labels = np.pad(np.where(same, ids[:, 1:], IGNORED_LABEL), ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
        if labels.shape != ids.shape:
            raise ValueError(
                f"`y` must hold a label for each position of `decoder_token_ids`, {ids.shape}. Received: shape "
                f"{labels.shape}."
            )
        counts = labels != IGNORED_LABEL
        default = counts & (mask != 0) & (labels != PAD_ID)
        if weights is None:
            weights = default.astype("float32")
        else:
            weights = to_rows("sample_weight", weights, 0, "float32")
            check_finite(weights)
            if weights.shape in ((len(ids),), (len(ids), 1)):
                weights = np.reshape(weights, (-1, 1)) * default
            elif weights.shape == ids.shape:
                weights = weights * counts
            else:
                raise ValueError(
                    f"`sample_weight` must have the shape of the labels, {ids.shape}, or one weight per row, "
                    f"({len(ids)},). Received: shape {weights.shape}."
                )
        labels = np.where(weights == 0, 0, labels).astype("int32")
        check_range("y", labels, self.vocabulary_size, " where `sample_weight` is not 0, or -100")
        return labels, weights.astype("float32")

    def _with_rows_added(self, inputs: dict[str, np.ndarray], labels, weights: np.ndarray) -> tuple:
        """Adds copies of the last row, with weight 0, up to a multiple of `multiple`."""
        added = -len(weights) % self.multiple
        if not added:
            return inputs, labels, weights

        def padded(x):
            return np.concatenate([x, np.repeat(np.asarray(x)[-1:], added, axis=0)])

        inputs, labels = keras.tree.map_structure(padded, (inputs, labels))
        return inputs, labels, np.concatenate([weights, np.zeros((added, weights.shape[1]), "float32")])


def check_range(name: str, ids: np.ndarray, vocabulary_size: int, where: str = "") -> None:
    """Checks that ids are in the vocabulary.

    Args:
        name: the argument's name, for the error.
        ids: [B, L].
        vocabulary_size: V.
        where: a restriction to add to the error.

    Raises:
        ValueError: if an id is not; the message names the first one and its position.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary_size):
        row, position = np.argwhere((ids < 0) | (ids >= vocabulary_size))[0]
        raise ValueError(
            f"`{name}` must be in [0, {vocabulary_size}), the backbone's vocabulary{where}. Received: "
            f"{ids[row, position]} in row {row}, position {position}."
        )


def to_rows(name: str, value, fill: int, dtype: str = "int32", width: int = 0) -> np.ndarray:
    """Rows of numbers as one array.

    Args:
        name: the argument's name, for the error.
        value: an array or tensor of any library, a ragged tensor, or a list of rows, lists or arrays of any length.
        fill: the number that pads short rows on the right.
        dtype: "int32", or "float32" for weights, which may be [B] too.
        width: the minimum length L if `value` is a list.

    Returns:
        A numpy array [B, L].

    Raises:
        ValueError: if `value` has another form, number type or rank.
    """
    array = _array(value, fill, dtype, width)
    if array is not None and array.dtype.kind == "f" and name.endswith("_mask") and (array == np.rint(array)).all():
        array = array.astype("int32")  # e.g. a mask by `torch.ones`
    kinds, ranks, expected = "iub", (2,), "integers [B, L]"
    if dtype != "int32":
        kinds, ranks, expected = "iubf", (1, 2), "numbers [B, L], or [B]"
    if array is None or array.dtype.kind not in kinds or array.ndim not in ranks:
        received = described(value) if array is None else f"shape {array.shape}, dtype {array.dtype}"
        raise ValueError(f"`{name}` must hold {expected}: an array, or a list of rows. Received: {received}.")
    return array.astype(dtype, copy=False)


def _array(value, fill: int, dtype: str, width: int = 0) -> np.ndarray | None:
    """`to_rows` without its checks; None if `value` cannot be an array of numbers."""
    if hasattr(value, "to_list") and hasattr(value, "row_lengths"):  # a ragged tensor
        value = value.to_list()
    if not isinstance(value, (list, tuple)):
        return to_numpy(value)
    rows = [to_numpy(row) for row in value]
    if any(row is None or (row.dtype.kind not in "iubf" and row.size) for row in rows):
        return None
    if not rows or any(row.ndim != 1 for row in rows):
        return np.asarray(rows) if len({row.shape for row in rows}) == 1 else None
    array = np.full(
        (len(rows), max(width, *map(len, rows))), fill, np.result_type(dtype, *(r.dtype for r in rows if r.size))
    )
    for padded, row in zip(array, rows, strict=True):
        padded[: len(row)] = row
    return array


def to_numpy(value) -> np.ndarray | None:
    """A tensor of any library, an array or a nested list as a numpy array; None if it cannot be converted."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if hasattr(value, "numpy"):  # TensorFlow's, because numpy warns about its `__array__`
        return np.asarray(value.numpy())
    try:
        return np.asarray(value)
    except ValueError:
        return None


def _may_be_labels(y) -> bool:
    """Whether y is integers [B, T]."""
    array = _array(y, IGNORED_LABEL, "int32")
    return array is not None and array.ndim == 2 and array.dtype.kind in "iu"
