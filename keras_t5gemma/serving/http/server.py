"""`Server`: a model that answers over HTTP, with OpenAI's API."""

import signal
import socket
import threading
import time
from collections.abc import Sequence
from typing import Self

from keras_t5gemma.serving.batcher import Batcher
from keras_t5gemma.serving.http.places import check_installed, checked_keys, listening_socket, url_of

# Seconds for what has been answered to reach its clients, after the last answer.
_SECONDS_TO_SEND = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server:
    """Answers chats, completions and embeddings over HTTP, as a client of OpenAI's API asks for them.

    Endpoints: `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`, `/v1/models`, `/health`, `/metrics`. Answers
    come from a `Batcher`, so each is that of `lm.generate` for the prompt alone. The server needs the packages of the
    extra `server`.

    A `with` statement starts it in threads of its own, waits until all programs are compiled, and closes it at the end.
    `serve` does the same until a signal arrives.

    Args:
        lm: a `T5GemmaSeq2SeqLM` with a preprocessor. Chats need one with `chat=True`.
        name: the model's name, which requests have as `model`.
        host: the address to listen on. By default only this machine can connect. `"0.0.0.0"` is for all networks; pass
            an `api_key` then.
        port: the port; 0 for a free one, see `url`.
        slots: requests that are decoded at a time, as for `Batcher`.
        buckets: sizes of prompts in tokens, as for `Batcher`.
        max_length: the longest answer in tokens, plus one, as for `Batcher`.
        most_waiting: the most requests that wait for a slot; more are refused.
        chunk_size: as for `Batcher`.
        api_key: a key, or several, one of which each request to `/v1` must have; None for no key.

    Raises:
        ImportError: if Starlette or uvicorn are not installed.
        ValueError: if an argument is invalid, or the model has no preprocessor.

    Example:
        >>> with kt.Server(lm, port=0) as server:
        ...     client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        ...     messages = [{"role": "user", "content": "Why is the sky blue?"}]
        ...     answer = client.chat.completions.create(model="t5gemma", messages=messages)
    """

    def __init__(
        self,
        lm,
        *,
        name: str = "t5gemma",
        host: str = "127.0.0.1",
        port: int = 8000,
        slots: int = 32,
        buckets: Sequence[int] | None = None,
        max_length: int | None = None,
        most_waiting: int = 128,
        chunk_size: int | None = None,
        api_key: str | Sequence[str] | None = None,
    ):
        check_installed()
        from keras_t5gemma.serving.http.app import new_app
        from keras_t5gemma.serving.http.service import Service

        if lm.preprocessor is None:
            raise ValueError("A server answers texts, and this model has no `preprocessor`. Make it with one.")
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a text that is not empty. Received: name={name!r}.")
        keys = checked_keys(api_key)
        batcher = Batcher(
            lm,
            slots=slots,
            buckets=buckets,
            max_length=max_length,
            most_waiting=most_waiting,
            chunk_size=chunk_size,
        )
        if batcher.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, `<bos>` and a token. Received: {batcher.max_length}.")
        self._service = Service(
            lm,
            name,
            batcher,
            buckets=batcher.buckets,
            longest=batcher.max_length - 1,
            slots=slots,
            most_waiting=most_waiting,
        )
        self._app = new_app(self._service, keys)
        self._host, self._port = host, port
        self._listener: socket.socket | None = None
        self._uvicorn = None
        self._thread: threading.Thread | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """The server's address, such as "http://127.0.0.1:8000". Clients of OpenAI's API need "/v1" after it.

        Raises:
            RuntimeError: if the server was not started.
        """
        if not self._url:
            raise RuntimeError(
                "The server has no address yet: call `start` or `serve`, or use it in a `with` statement."
            )
        return self._url

    def start(self) -> Self:
        """Starts to listen, and to compile, in threads of its own; returns at once.

        Raises:
            OSError: if the address is taken or unknown.
            RuntimeError: if the server was started before.
        """
        import uvicorn

        if self._thread is not None:
            raise RuntimeError("The server was started already. Make a new one.")
        self._listener = listening_socket(self._host, self._port)
        self._url = url_of(self._listener)
        config = uvicorn.Config(
            self._app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_SECONDS_TO_SEND,
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([self._listener],), name="keras_t5gemma server", daemon=True
        )
        self._thread.start()
        threading.Thread(target=self._service.warm, name="keras_t5gemma warm-up", daemon=True).start()
        return self

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Waits until all programs are compiled, which `/health` tells too.

        Args:
            timeout: seconds; None to wait as long as it takes.

        Raises:
            TimeoutError: if the time is up; the server goes on.
            BatcherClosed: if the server was closed before.
            Exception: the error that ended the preparations, such as a `MemoryError`.
        """
        if not self._service.wait(timeout):
            raise TimeoutError(f"The model was not compiled within {timeout} seconds. The server goes on.")
        self._service.check_prepared()

    def serve(self, timeout: float | None = 30, on_ready=None) -> None:
        """Answers until SIGINT (Ctrl+C) or SIGTERM arrives, then closes the server. To be called in the main thread.

        A second signal ends the program at once.

        Args:
            timeout: as for `close`.
            on_ready: is called without arguments when all programs are compiled.

        Raises:
            OSError: as for `start`.
            RuntimeError: if the server ended by itself.
            Exception: as for `wait_until_ready`.
        """
        received = []
        # A handler must not take locks, which the interrupted line may hold.
        previous = {number: signal.signal(number, lambda got, _: received.append(got)) for number in _SIGNALS}
        try:
            self.start()
            is_told = False
            while not received:
                if self._thread is None or not self._thread.is_alive():
                    raise RuntimeError("The server ended by itself. What it printed says why.")
                if not is_told and self._service.wait(0):
                    self.wait_until_ready()
                    is_told = True
                    if on_ready is not None:
                        on_ready()
                time.sleep(0.05)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.close(timeout)

    def close(self, timeout: float | None = 30) -> None:
        """Refuses new requests, answers the open ones, and stops listening. May be called again.

        Args:
            timeout: seconds for open requests; what is left then fails. None to answer everything. What has been
                answered gets a few more seconds to reach slow clients.
        """
        self._service.close(timeout)
        if self._uvicorn is not None and self._thread is not None:
            self._uvicorn.should_exit = True
            self._thread.join(_SECONDS_TO_SEND + 2)
        if self._listener is not None:
            self._listener.close()

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.close(0)
            raise
        return self

    def __exit__(self, error, *_) -> None:
        # After an error nobody waits for answers.
        self.close(30 if error is None else 0)
