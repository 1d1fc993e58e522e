"""Clients that leave: what is done for them ends, and frees its slots."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from keras_t5gemma.serving.http.errors import RequestError, error_of

Result = TypeVar("Result")
Events = AsyncGenerator[dict, None]
# As nginx logs a client that left; nobody receives it.
LEFT = 499


async def unless_left(receive: Receive, work: Callable[[], Awaitable[Result]]) -> Result:
    """The result of a coroutine, which is cancelled as soon as the client leaves.

    Args:
        receive: of the request, whose body has been read.
        work: makes the coroutine.

    Raises:
        ClientDisconnect: if the client left.
        Exception: any error of the coroutine.
    """
    results, errors = [], []
    async with anyio.create_task_group() as group:

        async def run() -> None:
            try:
                results.append(await work())
            except Exception as error:  # not through the group, which would wrap it
                errors.append(error)
            group.cancel_scope.cancel()

        group.start_soon(run)
        while (await receive())["type"] != "http.disconnect":
            continue
        group.cancel_scope.cancel()
    if errors:
        raise errors[0]
    if not results:
        raise ClientDisconnect
    return results[0]


class EventStream(Response):
    """Server-sent events, each a JSON object. The last is `[DONE]`, or an error.

    Args:
        first: the first events. They came before the response begins, so that an error until then has its own status.
        events: the others. It is closed in any case.
    """

    media_type = "text/event-stream"

    def __init__(self, first: list[dict], events: Events):
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until the last one, or until the client leaves."""
        try:
            await unless_left(receive, lambda: self._send(scope, send))
        except (ClientDisconnect, OSError):
            scope["state"]["outcome"] = LEFT
        finally:
            await self._events.aclose()

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            for event in self._first:
                await _send_event(send, _json(event))
            async for event in self._events:
                await _send_event(send, _json(event))
            await _send_event(send, "[DONE]")
        except OSError:
            raise
        except Exception as error:
            told: RequestError = error_of(error)
            scope["state"]["outcome"] = told.status
            await _send_event(send, _json(told.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
