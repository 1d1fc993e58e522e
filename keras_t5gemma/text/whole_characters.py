"""Ids that come one at a time, as text in whole characters."""

# A character of UTF-8 has up to four bytes, so up to three wait for the rest of it. SentencePiece shows each byte that
# belongs to no whole character as U+FFFD.
_PENDING = 3
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of ids as it grows, in whole characters.

    A character outside the vocabulary is spelt in bytes, an id each: nothing of it is given before its last byte.

        ids      ▁price  :  ▁    <0xE2> <0x82> <0xAC>  5
        given    " price" ":" " "  ""     ""     "€"   "5"

    What was given, with what `finish()` gives, is what the tokenizer makes of all the ids at once.

    Args:
        detokenize: `list of ids -> str`.
    """

    def __init__(self, detokenize):
        self._detokenize = detokenize
        self._ids = []
        self._given = 0

    def add(self, ids):
        """The text that these ids, one or more, add for good; perhaps none."""
        self._ids.extend(ids)
        # All of it again each time: a piece's text depends on those around it (bytes, a first space), and even for
        # thousands of pieces this takes less time than a decode step.
        text = self._detokenize(self._ids)
        stable = len(text)
        while stable > max(self._given, len(text) - _PENDING) and text[stable - 1] == _NO_CHARACTER:
            stable -= 1
        return self._give(text[:stable])

    def finish(self):
        """The rest: bytes that never became a character."""
        return self._give(self._detokenize(self._ids) if self._ids else "")

    def _give(self, text):
        new = text[self._given :]
        self._given += len(new)
        return new
