"""Reward functions, and checks of their results."""

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from keras_t5gemma.checks import is_number


class Rewards:
    """The weighted sum of reward functions.

    Args:
        functions: a function, or a list of functions; see `reinforce`.
        weights: one number per function; 1 for each if None.
        columns: the names of the columns that prompts have.

    Raises:
        ValueError: if there is no function, one cannot be called or asks for an unknown column, or weights do not match
            the functions.

    Attributes:
        names: the functions' names, in order; equal names are numbered.
        weights: a number per function.
    """

    def __init__(
        self,
        functions: Callable | Sequence[Callable],
        weights: Sequence[float] | None,
        columns: Sequence[str],
    ):
        functions = [functions] if callable(functions) else functions
        if not isinstance(functions, (list, tuple)) or not functions or not all(map(callable, functions)):
            raise ValueError(
                f"`rewards` must be a function `(completions, **columns) -> list of numbers`, or a list of such "
                f"functions. Received: {functions!r}."
            )
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions) or not all(map(is_number, weights)):
            raise ValueError(
                f"`reward_weights` must have one finite number per reward function, {len(functions)}. Received: "
                f"{weights!r}."
            )
        self._functions, self.weights = list(functions), [float(weight) for weight in weights]
        self.names = _unique([getattr(function, "__name__", type(function).__name__) for function in functions])
        available = ["completions", "prompts", *columns]
        self._arguments = [
            _arguments(function, name, available) for function, name in zip(functions, self.names, strict=True)
        ]

    def __call__(
        self, completions: list[str], columns: Mapping[str, list], step: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The rewards of answers.

        Args:
            completions: R answers.
            columns: `prompts` and the columns of the prompts, R values each.
            step: the step, for errors.

        Returns:
            `(rewards, by_function)`: float64 [R], the weighted sum; and the rewards by each function's name.

        Raises:
            RuntimeError: if a function raises an exception.
            ValueError: if a function does not return one finite number per answer.
        """
        available = {"completions": completions, **columns}
        by_function = {}
        for function, name, wanted in zip(self._functions, self.names, self._arguments, strict=True):
            # Lists of its own: a function that sorts one in place changes nothing for the others.
            arguments = {argument: list(available[argument]) for argument in wanted}
            try:
                values = function(**arguments)
            except Exception as error:
                raise RuntimeError(
                    f"The reward function `{name}` raised {type(error).__name__}: {error}. It was called in step "
                    f"{step} with {len(completions)} completions, of which row 0 is {completions[0]!r:.200}."
                ) from error
            by_function[name] = _checked(values, name, completions, step)
        return np.array(self.weights) @ np.stack(list(by_function.values())), by_function


def _checked(values, name: str, completions: list[str], step: int) -> np.ndarray:
    """What a reward function returned, as float64 [R].

    Raises:
        ValueError: if it is not one finite number per answer; the message names the function, the step and the row.
    """
    where = f"The reward function `{name}` must return one finite number per completion, {len(completions)} in all."
    try:
        values = list(values)
    except TypeError:
        raise ValueError(f"{where} In step {step} it returned {values!r:.200}.") from None
    if len(values) != len(completions):
        raise ValueError(f"{where} In step {step} it returned {len(values)}.")
    for row, value in enumerate(values):
        # True and False are what a check of an answer returns.
        number = float(value) if isinstance(value, (bool, np.bool_)) else _number(value)
        if not is_number(number):
            raise ValueError(
                f"{where} In step {step} it returned {value!r:.100} for row {row}, the completion "
                f"{completions[row]!r:.200}."
            )
        values[row] = number
    return np.array(values, "float64")


def _number(value):
    """A scalar of numpy or of a backend, with any number of axes of size 1, as a Python float; others as they are."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (RuntimeError, TypeError, ValueError):
        return value


def _arguments(function: Callable, name: str, available: list[str]) -> list[str]:
    """The names of the arguments to pass to a reward function: those that it names, or all if it has `**columns`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins show no signature
        return available
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return available
    for parameter in parameters:
        is_required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if is_required and parameter.name not in available:
            raise ValueError(
                f"The reward function `{name}` needs `{parameter.name}`, which is not a column of the prompts. "
                f"Available are {', '.join(available)}."
            )
    return [parameter.name for parameter in parameters if parameter.name in available]


def _unique(names: list[str]) -> list[str]:
    """Names with a number after the second and later of equal ones: check, check_2."""
    counts: dict[str, int] = {}
    unique = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        unique.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return unique
