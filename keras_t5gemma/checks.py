"""Checks of arguments that many public functions share, so that all of them accept and refuse the same values."""

import math
import numbers
from collections.abc import Mapping

import numpy as np


def is_integer(value):
    """Whether a value is an integer, Python's or numpy's. Booleans are not, though Python counts them as integers."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value):
    """Whether a value is a finite number, Python's or numpy's, and not a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def integer(value, name, *, least=1, optional=False, none_means=""):
    """An integer argument of a public function.

    Args:
        value: what the caller passed.
        name: the argument's name, for the message.
        least: the smallest value that is accepted.
        optional: whether None is accepted too.
        none_means: what None stands for, for the message, e.g. "for all tokens".

    Returns:
        The value as a Python `int`, or None.

    Raises:
        ValueError: if it is a boolean, a float, anything else that is not an integer, or less than `least`.
    """
    if value is None and optional:
        return None
    if is_integer(value) and value >= least:
        return int(value)
    what = "a positive integer" if least == 1 else f"an integer of at least {least}"
    none = f", or None{none_means and ' ' + none_means}" if optional else ""
    raise ValueError(f"`{name}` must be {what}{none}. Received: {name}={value!r}.")


def integers(values, name):
    """A sequence of integers, as a tuple of Python's.

    Args:
        values: what the caller passed.
        name: the argument's name, for the message.

    Returns:
        A tuple of `int`.

    Raises:
        ValueError: if it is not a sequence, or holds anything that is not an integer.
    """
    is_sequence = hasattr(values, "__iter__") and not isinstance(values, (str, bytes))
    listed = list(values) if is_sequence else None
    if not is_sequence or not all(map(is_integer, listed)):
        raise ValueError(
            f"`{name}` must be a sequence of integers. Received: {name}={listed if is_sequence else values!r}."
        )
    return tuple(map(int, listed))


def check_integer_fields(instance, **least):
    """Checks fields of a dataclass, frozen or not, and makes Python's integers of numpy's.

    Args:
        instance: the dataclass, in its `__post_init__`.
        **least: field name -> the smallest value that is accepted.

    Raises:
        ValueError: as `integer`.
    """
    for name, smallest in least.items():
        object.__setattr__(instance, name, integer(getattr(instance, name), name, least=smallest))


def check_finite(weights):
    """Refuses weights that would make the loss and all that is trained NaN.

    Raises:
        ValueError: if one is infinite or not a number.
    """
    if not np.isfinite(weights).all():
        row = np.argwhere(~np.isfinite(weights))[0][0]
        raise ValueError(f"`sample_weight` must hold finite numbers. Received: {weights[row]} in row {row}.")


def check_token_ids(x, vocabulary_size):
    """Checks the token ids among model inputs that are numpy arrays; anything else passes.

    Raises:
        ValueError: if an id is not in `[0, vocabulary_size)`; the message names the input.
    """
    if not isinstance(x, Mapping):
        return
    for name in ("encoder_token_ids", "decoder_token_ids"):
        ids = x.get(name)
        if not isinstance(ids, np.ndarray) or not ids.size:
            continue
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"`{name}` must hold integers. Received: dtype={ids.dtype}.")
        if ids.min() < 0 or ids.max() >= vocabulary_size:
            raise ValueError(
                f"`{name}` must be in [0, {vocabulary_size}), the backbone's vocabulary. Received ids from {ids.min()} "
                f"to {ids.max()}."
            )
