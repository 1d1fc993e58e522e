"""Checks of arguments that many public functions share, so that all of them accept and refuse the same values."""

import contextlib
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeGuard, overload

import numpy as np


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, Python's or numpy's. A boolean is not, though Python counts it as an integer."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, Python's or numpy's, and not a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


@contextlib.contextmanager
def arguments_named(names: Mapping[str, str]) -> Iterator[None]:
    """A context in which a ValueError names the arguments that the caller has, not those they are passed on as.

    Args:
        names: the caller's names by those that are used inside.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for inner, outer in names.items():
            message = message.replace(f"`{inner}`", f"`{outer}`")
        raise ValueError(message) from None


@overload
def integer(
    value: object, name: str, *, least: int = 1, optional: Literal[False] = False, none_means: str = ""
) -> int: ...
@overload
def integer(value: object, name: str, *, least: int = 1, optional: bool, none_means: str = "") -> int | None: ...
def integer(value: object, name: str, *, least: int = 1, optional: bool = False, none_means: str = "") -> int | None:
    """Checks an integer argument of a public function.

    Args:
        value: the caller's value.
        name: the argument's name, for the message.
        least: the smallest valid value.
        optional: whether None is valid too.
        none_means: the meaning of None, for the message, e.g. "for all tokens".

    Returns:
        The value as a Python `int`, or None.

    Raises:
        ValueError: if the value is a boolean, a float, anything else that is not an integer, or less than `least`.
    """
    if value is None and optional:
        return None
    if is_integer(value) and value >= least:
        return int(value)
    expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
    or_none = f", or None{none_means and ' ' + none_means}" if optional else ""
    raise ValueError(f"`{name}` must be {expected}{or_none}. Received: {name}={value!r}.")


def integers(values: Iterable[int], name: str) -> tuple[int, ...]:
    """Checks a sequence of integers.

    Args:
        values: the caller's values.
        name: the argument's name, for the message.

    Returns:
        The values as a tuple of Python's `int`.

    Raises:
        ValueError: if the values are not a sequence, or one of them is not an integer.
    """
    is_sequence = hasattr(values, "__iter__") and not isinstance(values, (str, bytes))
    items = list(values) if is_sequence else []
    if not is_sequence or not all(map(is_integer, items)):
        raise ValueError(
            f"`{name}` must be a sequence of integers. Received: {name}={items if is_sequence else values!r}."
        )
    return tuple(map(int, items))


def check_integer_fields(instance: object, **least: int) -> None:
    """Checks integer fields of a dataclass, frozen or not, and converts numpy's integers to Python's.

    Args:
        instance: the dataclass, in its `__post_init__`.
        **least: field name -> the smallest valid value.

    Raises:
        ValueError: as for `integer`.
    """
    for name, smallest in least.items():
        object.__setattr__(instance, name, integer(getattr(instance, name), name, least=smallest))


def check_finite(weights: np.ndarray) -> None:
    """Refuses weights [B, ...] that would make the loss, and with it every trained weight, NaN.

    Raises:
        ValueError: if a weight is infinite or NaN.
    """
    if not np.isfinite(weights).all():
        row = np.argwhere(~np.isfinite(weights))[0][0]
        raise ValueError(f"`sample_weight` must hold finite numbers. Received: {weights[row]} in row {row}.")


def check_token_ids(x: object, vocabulary_size: int) -> None:
    """Checks the token ids in model inputs. Only numpy arrays are checked; other kinds of inputs pass.

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
