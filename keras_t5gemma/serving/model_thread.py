"""The thread that owns the slots: it gives waiting requests a slot, decodes, and hands out what was decoded."""

import collections
import threading
import time

import numpy as np
from keras import ops

from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.memory import out_of_memory_explained, slots_explanation
from keras_t5gemma.serving.answers import OpenAnswer
from keras_t5gemma.serving.handles import BatcherClosed, Handle, QueueFull
from keras_t5gemma.serving.requests import Request
from keras_t5gemma.serving.rows import rows_of, set_row
from keras_t5gemma.serving.slots import SlotPrograms

_CLOSED = "The batcher is closed."
# More than a chunk of steps takes.
_SECONDS_OF_STEPS = 5.0


class ModelThread:
    """A queue of requests, and the thread that answers them.

    The lock protects the queue and the list of slots. The state of the slots belongs to the thread. A request is done
    as soon as its handle is, whoever ended it: the thread, its caller or `close`. The thread then frees its slot.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        slots: B.
        buckets: sizes of prompts, ascending.
        length: L, positions per slot.
        chunk_size: the most steps between two looks at the queue.
        most_waiting: the most requests that wait for a slot.
    """

    def __init__(self, lm, slots: int, buckets: tuple[int, ...], length: int, chunk_size: int, most_waiting: int):
        self._lm = lm
        self._buckets = buckets
        self._length = length
        self._chunk_size = chunk_size
        self._most_waiting = most_waiting
        self._programs = SlotPrograms(lm, slots, buckets[-1], length)
        self._rows = rows_of(slots)
        self._state = None
        self._changed = threading.Condition()
        self._waiting: collections.deque[tuple[Request, Handle]] = collections.deque()
        self._open: list[OpenAnswer | None] = [None] * slots
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def counts(self) -> tuple[int, int]:
        """`(waiting, running)`: requests that wait for a slot, and requests that have one."""
        with self._changed:
            return len(self._waiting), sum(answer is not None for answer in self._open)

    def submit(self, request: Request, *, always: bool = False) -> Handle:
        """Adds a request to the queue, and starts the thread if it does not run yet.

        Args:
            request: the request.
            always: whether a full queue takes it too.

        Raises:
            BatcherClosed: if the batcher is closed.
            QueueFull: if the queue is full.
        """
        handle = Handle()
        with self._changed:
            if self._is_closing:
                raise BatcherClosed(_CLOSED)
            self._drop_done()
            room = self._most_waiting + self._open.count(None)
            if len(self._waiting) >= room and not always:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait for one of {len(self._open)} slots, and most_waiting="
                    f"{self._most_waiting}. Submit the request again later."
                )
            self._waiting.append((request, handle))
            if self._thread is None:
                # A daemon, so that a batcher that nobody closed does not keep the program from ending.
                self._thread = threading.Thread(target=self._run, name="keras_t5gemma batcher", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return handle

    def close(self, timeout: float | None = None) -> None:
        """Takes no more requests, answers the open ones for `timeout` seconds, and fails those that are left."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._is_closing = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        with self._changed:
            left = [handle for _, handle in self._waiting]
            left += [answer.handle for answer in self._open if answer is not None]
            self._waiting.clear()
            self._changed.notify_all()
        for handle in left:
            handle.fail(BatcherClosed(f"{_CLOSED} It had no time left for this request."))

    def abandon(self) -> None:
        """Fails what is open, and waits a few seconds for the steps that run: a program cannot end during them."""
        self.close(0)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_SECONDS_OF_STEPS)

    def _run(self) -> None:
        while True:
            try:
                if (admitted := self._next_admitted()) is None:
                    break
                self._turn(admitted)
            except BaseException as error:
                self._fail_open(error)
        self._state = None

    def _next_admitted(self) -> list[tuple[int, Request]] | None:
        """Waits for work, and gives waiting requests a slot.

        Returns:
            `(slot, request)` of those that are new, perhaps none while others run. None once the batcher is closed and
            nothing is open.
        """
        with self._changed:
            self._free_done()
            self._drop_done()
            while not self._waiting and not any(self._open):
                if self._is_closing:
                    return None
                self._changed.wait()
                self._drop_done()
            admitted = []
            for slot, answer in enumerate(self._open):
                if answer is None and (following := self._next_answer()) is not None:
                    self._open[slot] = following
                    admitted.append((slot, following.request))
            return admitted

    def _next_answer(self) -> OpenAnswer | None:
        """The first of the waiting requests, with its answer begun; None if nothing waits."""
        while self._waiting:
            request, handle = self._waiting.popleft()
            try:
                return OpenAnswer(self._lm, request, handle)
            except Exception as error:
                handle.fail(error)
        return None

    def _turn(self, admitted: list[tuple[int, Request]]) -> None:
        """Fills the slots of new requests, decodes a chunk, and hands out the tokens."""
        state, self._state = self._state, None  # lost if a program fails: it may have overwritten it
        sizes = len(self._open), self._buckets[-1], self._length
        with reading(self._lm, "Batcher"), out_of_memory_explained(lambda: slots_explanation(self._lm, *sizes)):
            state = self._programs.start() if state is None else state
            for slot, request in admitted:
                bucket = next(size for size in self._buckets if size >= len(request.encoder_ids))
                state = self._programs.insert(state, slot, request.encoder_ids, request.prompt, bucket)
                set_row(self._rows, slot, request.row)
            is_awaited = bool(self._waiting)
            state = self._programs.advance(state, self._rows, self._chunk_size, is_awaited=is_awaited)
            arrays = state.token_ids, state.log_probs, state.index, state.running
            arrays = [np.asarray(ops.convert_to_numpy(x)) for x in arrays]
        self._state = state
        self._hand_out(*arrays)

    def _hand_out(self, token_ids, log_probs, index, running) -> None:
        """Gives each open request its tokens; an error in one, such as in its text, ends that one only."""
        for slot, answer in enumerate(self._open):
            if answer is None or answer.handle.done:
                continue
            # A row that has not read its decoder prompt yet has no tokens of its own.
            length = max(int(index[slot]), len(answer.request.prompt))
            try:
                answer.take(token_ids[slot, :length], log_probs[slot, :length], not running[slot])
            except Exception as error:
                answer.handle.fail(error)

    def _free_done(self) -> None:
        """Frees the slots of requests that are done."""
        for slot, answer in enumerate(self._open):
            if answer is not None and answer.handle.done:
                self._open[slot] = None
                set_row(self._rows, slot)

    def _drop_done(self) -> None:
        """Drops waiting requests that their callers have cancelled."""
        if any(handle.done for _, handle in self._waiting):
            left = [item for item in self._waiting if not item[1].done]
            self._waiting.clear()
            self._waiting.extend(left)

    def _fail_open(self, error: BaseException) -> None:
        """Fails the requests that have a slot; those that wait get a new state."""
        for answer in self._open:
            if answer is not None:
                answer.handle.fail(error)
