"""The model behind the endpoints, and whether it is ready to answer."""

import asyncio
import enum
import threading
import time

from keras_t5gemma.serving.batcher import Batcher
from keras_t5gemma.serving.handles import BatcherClosed
from keras_t5gemma.serving.http.errors import unavailable
from keras_t5gemma.serving.http.metrics import Metrics
from keras_t5gemma.serving.http.vectors import Vectors


class State(enum.Enum):
    """What the service is doing."""

    warming = "The model is being compiled. Try again when /health says ready."
    ready = "ready"
    failed = "The model could not be prepared; the server's output says why."
    closing = "The server is stopping."


class Service:
    """A model, its batcher and its metrics.

    Args:
        lm: a `T5GemmaSeq2SeqLM` with a preprocessor.
        name: the model's name for clients.
        batcher: its `Batcher`.
        buckets: sizes of prompts, ascending.
        longest: the most tokens of an answer.
        slots: B of the batcher.
        most_waiting: of the batcher, and the most requests for vectors that are open.
    """

    def __init__(
        self,
        lm,
        name: str,
        batcher: Batcher,
        *,
        buckets: tuple[int, ...],
        longest: int,
        slots: int,
        most_waiting: int,
    ):
        self.preprocessor = lm.preprocessor
        self.name = name
        self.batcher = batcher
        self.vectors = Vectors(lm, buckets)
        self.longest = longest
        self.slots = slots
        self.most_waiting = most_waiting
        self.metrics = Metrics()
        self.created = int(time.time())
        self.open_embeddings = 0
        self.embeds = asyncio.Semaphore(1)  # one request at a time holds a thread
        self.error: BaseException | None = None
        self._state = State.warming
        self._changed = threading.Condition()

    @property
    def most_requests(self) -> int:
        """The most choices that fit into the batcher."""
        return self.slots + self.most_waiting

    @property
    def state(self) -> State:
        """The current state."""
        return self._state

    def check_ready(self) -> None:
        """Refuses requests while the service is not ready.

        Raises:
            RequestError: if it is not.
        """
        if self._state is not State.ready:
            raise unavailable(self._state.value, self._state.name)

    def warm(self) -> None:
        """Compiles all programs, and makes the service ready. An error is kept in `error`."""
        try:
            self.batcher.warm()
            self.vectors.warm()
        except BaseException as error:
            self.error = error
            self._become(State.failed)
        else:
            self._become(State.ready)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the service no longer warms up; returns False if the time is up."""
        with self._changed:
            return self._changed.wait_for(lambda: self._state is not State.warming, timeout)

    def check_prepared(self) -> None:
        """Raises the error that ended the preparations, or `BatcherClosed` if the service was closed before."""
        if self.error is not None:
            raise self.error
        if self._state is State.closing:
            raise BatcherClosed(State.closing.value)

    def close(self, timeout: float | None) -> None:
        """Refuses new requests, answers the open ones for `timeout` seconds, and fails the rest."""
        self._become(State.closing)
        self.batcher.close(timeout)

    def gauges(self) -> list[tuple[str, str, float]]:
        """`(name, about, value)` of the numbers that grow and shrink."""
        return [
            ("requests_running", "Requests that have a slot.", self.batcher.running),
            ("requests_waiting", "Requests that wait for a slot.", self.batcher.waiting),
            ("slots", "Slots of the decoding batch.", self.slots),
            ("ready", "1 if the server answers requests.", self._state is State.ready),
        ]

    def _become(self, state: State) -> None:
        with self._changed:
            if self._state is not State.closing:
                self._state = state
            self._changed.notify_all()
