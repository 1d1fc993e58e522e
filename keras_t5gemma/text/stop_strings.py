"""Stop strings: where a text ends that must not hold any of several strings."""

from collections.abc import Sequence

# More are a sign of a text passed in place of a list of texts. Each costs a search per chunk of tokens.
MOST_STOPS = 64


def checked_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The argument `stop` of `generate` as a tuple, empty for None.

    Raises:
        ValueError: if it is neither a string nor a sequence of strings, a string is empty, or there are more than
            `MOST_STOPS`.
    """
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    is_sequence = isinstance(stops, (list, tuple))
    if not is_sequence or len(stops) > MOST_STOPS or not all(isinstance(text, str) and text for text in stops):
        received = f"{len(stops)} of them" if is_sequence and len(stops) > MOST_STOPS else f"{stop!r}"[:200]
        raise ValueError(
            f'`stop` must be a string or a list of strings such as ["\\n\\n", "Question:"], none of them empty and at '
            f"most {MOST_STOPS}. Received: {received}."
        )
    return tuple(dict.fromkeys(stops))


def first_stop(text: str, stops: Sequence[str], start: int = 0) -> int | None:
    """The position in a text at which the first of the stop strings begins, from `start` on; None if there is none."""
    return min((at for stop in stops if (at := text.find(stop, start)) >= 0), default=None)


class StopStrings:
    """Finds the first stop string in a text that arrives in parts.

    A part is held back while it may be the beginning of a stop string:

        stops       "##", "Question:"
        add         "blue. "   "Que"   "en #"        "#More"
        returned    "blue. "   ""      "Queen "      ""       found

    All returned texts, with that of `finish()`, join to the text before `first_stop`, however the text is cut into
    parts.

    Args:
        stops: the stop strings; with none every text passes.

    Attributes:
        found: whether the text has ended with a stop string; later parts are ignored.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Adds the next part, and returns the text that is known to come before any stop string; it may be empty."""
        if self.found:
            return ""
        text = self._held + text
        # Everything returned before began no stop string, so matches lie within the held text and the new part.
        first, begun = first_stop(text, self._stops), self._begun(text)
        # A stop string that began earlier may still become complete, and then the text ends there.
        self.found = first is not None and first <= begun
        end = begun if first is None else min(first, begun)
        self._held = "" if self.found else text[end:]
        return text[:end]

    def finish(self) -> str:
        """The rest of the text, if no more will come: what was held back, up to a stop string in it."""
        text, self._held = self._held, ""
        if (first := first_stop(text, self._stops)) is not None:
            self.found = True
        return text[:first]

    def _begun(self, text: str) -> int:
        """The first position from which the text's end is the beginning of a stop string; the length if none is."""
        most = max(map(len, self._stops), default=0) - 1
        for at in range(max(0, len(text) - most), len(text)):
            if any(len(stop) > len(text) - at and stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)
