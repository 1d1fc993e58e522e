"""The choices of one HTTP request: requests of the batcher, submitted together and followed by the event loop."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Sequence

from starlette.concurrency import run_in_threadpool

from keras_t5gemma.serving.handles import Answer, Handle
from keras_t5gemma.serving.http.errors import bad, error_of
from keras_t5gemma.serving.http.sampling import Sampling
from keras_t5gemma.serving.http.service import Service


class Choices:
    """The answers to the prompts of one HTTP request: of each prompt n choices, one after the other.

        prompts   a a b b        n = 2
        index     0 1 2 3

    The batcher's threads tell the event loop about each new piece, so that no thread waits for an answer. Pieces of a
    slow reader wait in its handles, and hold nobody up.

    Args:
        service: the service.
        prompts: the prompts, as `Batcher.submit` takes them.
        sampling: the options.
        param: the field that holds the prompts, for errors.
    """

    def __init__(self, service: Service, prompts: Sequence, sampling: Sampling, param: str):
        self._service = service
        self._prompts = prompts
        self._sampling = sampling
        self._param = param
        self._handles: list[Handle] = []
        self._is_left = False
        self._lock = threading.Lock()

    async def submit(self) -> None:
        """Submits all choices, or none.

        Raises:
            RequestError: if a prompt is invalid, or the queue has not enough room.
        """
        count, most = len(self._prompts) * self._sampling.choices, self._service.most_requests
        if count > most:
            name = self._param if self._sampling.choices == 1 else "n"
            raise bad(name, f"The server answers up to {most} choices at a time. Received: {count} in one request.")
        self._started = time.perf_counter()
        try:
            # A thread, because a long prompt takes a while to be cut into tokens.
            await run_in_threadpool(self._submit_all)
        except Exception as error:
            self.leave()
            raise error_of(error, self._param) from error

    def leave(self) -> None:
        """Ends what is still open, and frees its slots."""
        with self._lock:
            self._is_left = True
            handles = list(self._handles)
        for handle in handles:
            handle.cancel()

    async def answers(self) -> list[Answer]:
        """Waits for all answers.

        Raises:
            RequestError: if one of them failed.
        """
        try:
            found = {index: answer async for index, _, answer in self.progress() if answer is not None}
            return [found[index] for index in range(len(found))]
        finally:
            self.leave()

    async def progress(self) -> AsyncIterator[tuple[int, str, Answer | None]]:
        """Follows the choices.

        Yields:
            `(index, text, answer)`: new text of a choice, and its answer if it has ended.

        Raises:
            RequestError: if one of them failed.
        """
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(changed.set)

        for handle in self._handles:
            handle.watch(tell)
        read, open_choices = [0] * len(self._handles), dict(enumerate(self._handles))
        while open_choices:
            await changed.wait()
            changed.clear()
            for index, handle in list(open_choices.items()):
                pieces, is_last = handle.pieces(read[index])
                if not pieces and not is_last:
                    continue
                answer = self._answer_of(handle) if is_last else None
                if not any(read):
                    self._service.metrics.first_token.observe(time.perf_counter() - self._started)
                read[index] += max(1, len(pieces))
                if is_last:
                    del open_choices[index]
                yield index, "".join(pieces), answer
        self._service.metrics.answer.observe(time.perf_counter() - self._started)

    def _answer_of(self, handle: Handle) -> Answer:
        try:
            answer = handle.result(0)
        except Exception as error:
            raise error_of(error) from error
        self._service.metrics.generated_tokens.add(len(answer.token_ids))
        return answer

    def _submit_all(self) -> None:
        for prompt in self._prompts:
            for choice in range(self._sampling.choices):
                handle = self._service.batcher.submit(prompt, **self._sampling.options_of(choice))
                with self._lock:
                    self._handles.append(handle)
                    is_left = self._is_left
                if is_left:
                    handle.cancel()
                    return


def usage(answers: Sequence[Answer], choices: int) -> dict[str, int]:
    """The numbers of tokens: a prompt counts once, however many choices it has; an answer with the token that ended it.

    Args:
        answers: all answers of a request, in the order of their indexes.
        choices: n.
    """
    prompt = sum(answer.prompt_tokens for answer in answers[::choices])
    completion = sum(len(answer.token_ids) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
