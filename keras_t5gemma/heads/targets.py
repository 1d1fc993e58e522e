"""Labels of classifiers: ids or names to arrays, with every value checked."""

from collections.abc import Callable, Sequence

import numpy as np

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.suggestions import did_you_mean
from keras_t5gemma.training.losses.labels import IGNORED_LABEL

PROBLEMS = ("single", "multi", "regression")


def check_labels(labels: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """Checks the names of classes.

    Args:
        labels: one name per class, or None.
        num_classes: the number of classes.

    Raises:
        ValueError: if the names are not different texts, one per class.
    """
    if labels is None:
        return None
    names = () if isinstance(labels, str) else tuple(labels)
    if len(names) != num_classes or len(set(names)) != len(names) or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"`labels` must hold num_classes={num_classes} different texts, one name per class. Received: {labels!r}."
        )
    return names


def class_ids(y, num_classes: int, labels: Sequence[str] | None, *, ignored: bool = False) -> np.ndarray:
    """Ids or names of classes, of any shape, as int32.

    Args:
        y: ids, or names if `labels` is set.
        num_classes: the number of classes.
        labels: the classes' names, or None.
        ignored: whether -100 is valid too.

    Raises:
        ValueError: if an id is out of range, or a name is unknown.
    """
    array = np.asarray(y)
    if array.dtype.kind in "US" or (array.dtype.kind == "O" and all(isinstance(n, (str, bytes)) for n in array.flat)):
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in array.flat]
        array = np.array([_id_of(name, labels) for name in names], "int32").reshape(array.shape)
    if array.dtype.kind not in "iub" and not (array.dtype.kind == "f" and (array == np.rint(array)).all()):
        raise ValueError(f"`y` must hold ids of classes, integers, or their names. Received: {array.ravel()[:5]}.")
    is_valid = (array >= 0) & (array < num_classes) | (ignored & (array == IGNORED_LABEL))
    if not is_valid.all():
        place = np.argwhere(~is_valid)[0]
        raise ValueError(
            f"`y` must be in [0, {num_classes}), the classes of the model{', or -100' if ignored else ''}. Received: "
            f"{array[tuple(place)]} in row {place[0]}."
        )
    return array.astype("int32")


def single_targets(y, num_classes: int, labels: Sequence[str] | None) -> np.ndarray:
    """Targets of a problem with one class per text: ids, int32 [B], from ids or names [B] or [B, 1]."""
    array = np.asarray(y)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"`y` must hold one class per text, [B]. Received: shape {array.shape}.")
    return class_ids(array, num_classes, labels)


def multi_targets(y, num_classes: int, labels: Sequence[str] | None) -> np.ndarray:
    """Targets of a problem with any number of classes per text: float32 [B, C].

    Args:
        y: [B, C] of zeros and ones (or probabilities); or a list of names or ids per text.
        num_classes: C.
        labels: the classes' names, or None.
    """
    is_array = hasattr(y, "shape") and len(y.shape) == 2
    rows = None if is_array else [np.atleast_1d(np.asarray(row)) for row in y]
    if rows is not None and any(row.dtype.kind in "USO" or len(row) != num_classes for row in rows):
        flags = np.zeros((len(rows), num_classes), "float32")
        for i, row in enumerate(rows):
            if row.size:
                flags[i, class_ids(row, num_classes, labels)] = 1
        return flags
    array = _finite(np.asarray(y))
    if array.ndim != 2 or array.shape[1] != num_classes or (array < 0).any() or (array > 1).any():
        raise ValueError(
            f"`y` must hold 0 or 1 for each of {num_classes} classes, [B, {num_classes}], or a list of classes per "
            f"text. Received: shape {array.shape}, values from {array.min()} to {array.max()}."
        )
    return array


def regression_targets(y, num_classes: int, labels: Sequence[str] | None) -> np.ndarray:
    """Targets of a regression: float32 [B, C], from [B, C], or from [B] if C is 1."""
    del labels
    array = _finite(np.asarray(y))
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] != num_classes:
        raise ValueError(f"`y` must hold numbers [B, {num_classes}]. Received: shape {array.shape}.")
    return array


TARGETS: dict[str, Callable] = {"single": single_targets, "multi": multi_targets, "regression": regression_targets}


def warn_of_nothing_to_learn(y: np.ndarray, sample_weight: np.ndarray | None) -> None:
    """Warns if all labels of a training are the same, or all weights are 0.

    Args:
        y: ids [B] or [B, S], -100 where there is none; or numbers [B, C].
        sample_weight: [B], [B, S] or None.
    """
    if sample_weight is not None and sample_weight.size and not sample_weight.any():
        warn_caller("All of `sample_weight` is 0: nothing is learned. Leave it out for equal weights.")
    rows = y[y != IGNORED_LABEL] if y.dtype.kind == "i" else y
    if len(rows) > 1 and (rows == rows[0]).all():
        value = f"class {rows[0]}" if y.dtype.kind == "i" else (rows[0].tolist() if rows.shape[1] > 1 else rows[0, 0])
        warn_caller(
            f"All {len(rows)} labels are {value}: there is nothing to tell apart. Check that the data are not sorted "
            f"or filtered by label."
        )


def _id_of(name: str, labels: Sequence[str] | None) -> int:
    if labels is None:
        raise ValueError(
            f"`y` holds names of classes, and the model has none. Pass `labels=[...]` to the model, or ids in `y`. "
            f"Received: {name!r}."
        )
    if name not in labels:
        raise ValueError(f"`y` must hold names among {list(labels)}. Received: {name!r}.{did_you_mean(name, labels)}")
    return labels.index(name)


def _finite(array: np.ndarray) -> np.ndarray:
    """Numbers as float32.

    Raises:
        ValueError: if they are not numbers, or some are not finite.
    """
    if array.dtype.kind not in "iubf":
        raise ValueError(f"`y` must hold numbers. Received: {array.ravel()[:5]}.")
    if not np.isfinite(array.astype("float64")).all():
        row = np.argwhere(~np.isfinite(array.astype("float64")))[0][0]
        raise ValueError(f"`y` must hold finite numbers. Received: {array[row]} in row {row}.")
    return array.astype("float32")
