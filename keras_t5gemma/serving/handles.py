"""Handles: what the caller of `submit` holds, and the answers that they give."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import numpy as np


class QueueFull(RuntimeError):
    """A batcher has as many waiting requests as it may have; try again later."""


class BatcherClosed(RuntimeError):
    """A batcher was closed before it could answer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """The answer to a request.

    Attributes:
        text: the text as `generate` returns it; None without a preprocessor.
        token_ids: int32 [N], the tokens as `generate` returns them: with the decoder prompt unless `strip_prompt`, and
            with the stop id if one ended the answer.
        log_probs: float32 [N], in nats, 0 for the decoder prompt; None if not requested.
        finish_reason: "stop" if a stop id or a stop string ended the answer, "length" if its limit did.
        prompt_tokens: the number of tokens that the encoder read.
        seed: the seed of the random draws, also if the batcher chose it; None for a greedy answer.
    """

    text: str | None
    token_ids: np.ndarray
    log_probs: np.ndarray | None
    finish_reason: str
    prompt_tokens: int
    seed: int | None


class Handle:
    """The answer to a request, while it is made and afterwards. All methods may be called from any thread.

    Iterating gives the pieces of the text, whole characters, as soon as they are certain; without a preprocessor ids.
    The joined pieces are `result().text`. Each iteration begins with the first piece. Nobody needs to read the pieces.

    Example:
        >>> handle = batcher.submit("Why is the sky blue?", max_new_tokens=64)
        >>> for text in handle:
        ...     print(text, end="", flush=True)
        >>> handle.result().finish_reason
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._pieces: list[str | int] = []
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._watchers: list[Callable[[], object]] = []

    @property
    def done(self) -> bool:
        """Whether the request was answered, has failed or was cancelled."""
        return self._answer is not None or self._error is not None

    def result(self, timeout: float | None = None) -> Answer:
        """Waits for the answer.

        Args:
            timeout: seconds; None to wait as long as it takes.

        Raises:
            TimeoutError: if the time is up; the request goes on.
            concurrent.futures.CancelledError: if the request was cancelled.
            BatcherClosed: if the batcher was closed first.
            Exception: the exception that ended the request.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"The request was not answered within {timeout} seconds. It goes on.")
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def cancel(self) -> bool:
        """Ends the request and frees its slot after the current steps; returns False if it is done already."""
        return self.fail(CancelledError("The request was cancelled."))

    def __iter__(self) -> Iterator[str] | Iterator[int]:
        given = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda start=given: len(self._pieces) > start or self.done)
                new, is_last = self.pieces(given)
            yield from new
            given += len(new)
            if is_last:
                if self._error is not None:
                    raise self._error
                return

    # For callers that must not wait, such as an event loop.

    def pieces(self, start: int = 0) -> tuple[list, bool]:
        """`(pieces, is_last)`: the pieces so far from the one at `start` on, and whether no more will come."""
        with self._changed:
            return self._pieces[start:], self.done

    def watch(self, function: Callable[[], object]) -> None:
        """Has a function called at once, and after each new piece and the end of the request.

        Args:
            function: is called in the thread of the model or of whoever ends the request. It must return at once, raise
                nothing, and not use the handle.
        """
        with self._changed:
            self._watchers.append(function)
            function()

    # For the thread of the model.

    def add(self, pieces: list) -> None:
        """Adds pieces for those who iterate; ignored once the request is done."""
        with self._changed:
            if pieces and not self.done:
                self._pieces.extend(pieces)
                self._tell()

    def finish(self, answer: Answer, pieces: list) -> bool:
        """Adds the last pieces and sets the answer; returns False if the request is done already."""
        return self._end(pieces, answer, None)

    def fail(self, error: BaseException) -> bool:
        """Sets the error; returns False if the request is done already."""
        return self._end([], None, error)

    def _end(self, pieces, answer, error) -> bool:
        with self._changed:
            if self.done:
                return False
            self._pieces.extend(pieces)
            self._answer, self._error = answer, error
            self._tell()
            return True

    def _tell(self) -> None:
        self._changed.notify_all()
        for function in self._watchers:
            function()
