"""What a mistyped name was probably meant to be: presets, keys, samplers, objectives, commands."""

import difflib
import re


def did_you_mean(name, known):
    """The closest of the known names, as a sentence to end an error message with.

    Case, and what stands between the parts of a name, do not count: "T5Gemma-2B-2B-UL2" is "t5gemma_2b_2b_ul2".
    Neither does what precedes the last slash, so that a hub's "google/t5gemma-2b-2b-ul2" finds it too.

    Args:
        name: what was given; anything that is not a string is like nothing.
        known: the names there are.

    Returns:
        " Did you mean 'greedy'?", with a space before it, or "" if no name is close.
    """
    if not isinstance(name, str):
        return ""
    plain = {}
    for candidate in known:
        plain.setdefault(_plain(candidate), candidate)
    near = difflib.get_close_matches(_plain(name), plain, n=1)
    return f" Did you mean {plain[near[0]]!r}?" if near else ""


def check_choice(value, name, choices, others=""):
    """Checks an argument that is one of some names.

    Args:
        value: what the caller passed.
        name: the argument's name, for the message.
        choices: the names there are, in the order to list them.
        others: what else the argument may be, for the message, e.g. ", or pairs of a Denoiser and a weight".

    Raises:
        ValueError: if it is not one of them; the message lists them, and says which one is close.
    """
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(choices)}{others}. Received: {value!r}.{did_you_mean(value, choices)}"
        )


def _plain(name):
    return re.sub(r"[^a-z0-9]+", "_", str(name).rpartition("/")[2].lower()).strip("_")
