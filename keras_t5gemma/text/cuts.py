"""Texts that were cut because they were too long: counted per call, and reported in one warning."""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from keras_t5gemma.caller_warnings import warn_caller


class Cuts:
    """The texts that one call has cut, by kind."""

    def __init__(self):
        self._of_kind = {}

    def add(self, kind: str, sizes: Sequence[int], limit: int, side: str | None) -> None:
        """Counts texts.

        Args:
            kind: the word for the texts in the warning, such as "prompts".
            sizes: the number of tokens of each text before it was cut.
            limit: the maximum number of tokens.
            side: "left" or "right"; None if texts that are too long were refused.
        """
        cut, total, longest, *_ = self._of_kind.get(kind, (0, 0, 0))
        cut += sum(size > limit for size in sizes)
        self._of_kind[kind] = (cut, total + len(sizes), max([longest, *sizes]), limit, side)

    def message(self) -> str:
        """The text of the warning; empty if nothing was cut."""
        return " ".join(
            f"{cut} of {total} {kind} {'was' if cut == 1 else 'were'} longer than {limit} tokens and "
            f"{'was' if cut == 1 else 'were'} cut on the {side}; the longest had {longest}."
            for kind, (cut, total, longest, limit, side) in self._of_kind.items()
            if cut
        )


# Per thread, so that calls at the same time count apart.
_CURRENT: ContextVar[Cuts | None] = ContextVar("cuts", default=None)


@contextlib.contextmanager
def cuts_reported() -> Iterator[None]:
    """A context that counts the texts which are cut in it. At its end, one warning reports them, if there are any."""
    cuts = Cuts()
    token = _CURRENT.set(cuts)
    try:
        yield
    finally:
        _CURRENT.reset(token)
    if message := cuts.message():
        warn_caller(message)


def count_cuts(kind: str, sizes: Sequence[int], limit: int, side: str | None) -> None:
    """Counts texts for the `cuts_reported` around the call, if there is one; arguments as for `Cuts.add`."""
    if (cuts := _CURRENT.get()) is not None:
        cuts.add(kind, sizes, limit, side)
