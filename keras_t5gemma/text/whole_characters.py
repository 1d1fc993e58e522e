"""Decodes ids that arrive one at a time to text in whole characters."""

from collections.abc import Callable, Iterable

# A UTF-8 character has up to four bytes, so up to three may wait for the last one. SentencePiece decodes each byte of
# an incomplete character as U+FFFD.
_MAX_PENDING = 3
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing list of ids, in whole characters.

    A character outside the vocabulary is spelled in bytes, one id per byte. It is returned together with its last byte.

        ids         ▁price  :  ▁    <0xE2> <0x82> <0xAC>  5
        returned    " price" ":" " "  ""     ""     "€"   "5"

    All returned texts, with that of `finish()`, join to the text that the tokenizer decodes from all ids at once.

    Args:
        detokenize: a function of a list of ids that returns their text.
    """

    def __init__(self, detokenize: Callable[[list[int]], str]):
        self._detokenize = detokenize
        self._ids = []
        self._num_returned = 0  # characters

    def add(self, ids: Iterable[int]) -> str:
        """Adds one or more ids, and returns the new text that later ids cannot change; it may be empty."""
        self._ids.extend(ids)
        # All ids are decoded again each time: a piece's text depends on its neighbors (bytes, a first space), and even
        # for thousands of pieces this takes less time than a decoding step.
        text = self._detokenize(self._ids)
        stable = len(text)
        while stable > max(self._num_returned, len(text) - _MAX_PENDING) and text[stable - 1] == _REPLACEMENT:
            stable -= 1
        return self._new_part(text[:stable])

    def finish(self) -> str:
        """The rest of the text: bytes that never became a character."""
        return self._new_part(self._detokenize(self._ids) if self._ids else "")

    def _new_part(self, text: str) -> str:
        new = text[self._num_returned :]
        self._num_returned += len(new)
        return new
