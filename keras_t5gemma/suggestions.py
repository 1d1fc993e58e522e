"""Suggestions for mistyped names: presets, keys, samplers, objectives, commands."""

import difflib
import inspect
import re
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The closest of the known names, as a sentence to end an error message with.

    Case does not count, and neither do the separators in a name: "T5Gemma-2B-2B-UL2" is "t5gemma_2b_2b_ul2". The part
    before the last slash is ignored, so that a hub's "google/t5gemma-2b-2b-ul2" matches too.

    Args:
        name: the caller's name. A value that is not a string matches nothing.
        known: the valid names.

    Returns:
        " Did you mean 'greedy'?", with a space before it, or "" if no name is close.
    """
    if not isinstance(name, str):
        return ""
    by_normalized = {}
    for candidate in known:
        by_normalized.setdefault(_normalized(candidate), candidate)
    matches = difflib.get_close_matches(_normalized(name), by_normalized, n=1)
    return f" Did you mean {by_normalized[matches[0]]!r}?" if matches else ""


def check_choice(value: object, name: str, choices: Iterable[str], others: str = "") -> None:
    """Checks an argument that must be one of several names.

    Args:
        value: the caller's value.
        name: the argument's name, for the message.
        choices: the valid names, in the order in which the message lists them.
        others: further valid values, for the message, e.g. ", or pairs of a Denoiser and a weight".

    Raises:
        ValueError: if the value is not one of the names. The message lists them, and suggests a close one.
    """
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(choices)}{others}. Received: {value!r}.{did_you_mean(value, choices)}"
        )


def check_keywords(owner: type, kwargs: Iterable[str], known: Iterable[str], hint: str = "") -> None:
    """Raises an error for keyword arguments that Keras would silently accept.

    Args:
        owner: the class whose constructor, or `from_preset`, got them.
        kwargs: the names that arrived as `**kwargs`.
        known: those that are valid there.
        hint: what the message says in place of the valid names.

    Raises:
        TypeError: if a name is unknown. The message lists the valid names, and suggests a close one.
    """
    known = list(known)
    if not (unknown := sorted(set(kwargs) - set(known))):
        return
    parameters = inspect.signature(owner.__init__).parameters.values()
    known = dict.fromkeys([*(p.name for p in parameters if p.kind is p.KEYWORD_ONLY), *known])
    hint = hint or f" Known are {', '.join(known)}.{did_you_mean(unknown[0], known)}"
    raise TypeError(f"{owner.__name__} got an unexpected keyword argument {unknown[0]!r}.{hint}")


def _normalized(name: object) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(name).rpartition("/")[2].lower()).strip("_")
