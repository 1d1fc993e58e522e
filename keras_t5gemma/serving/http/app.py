"""The endpoints as an ASGI application."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keras_t5gemma.serving.http.chat import Chat
from keras_t5gemma.serving.http.clients import LEFT
from keras_t5gemma.serving.http.completions import Completions
from keras_t5gemma.serving.http.embeddings import embeddings
from keras_t5gemma.serving.http.errors import RequestError, error_of
from keras_t5gemma.serving.http.metrics import MEDIA_TYPE
from keras_t5gemma.serving.http.service import Service, State

Endpoint = Callable[[Request, Service], Awaitable[Response]]


def new_app(service: Service, keys: Sequence[str] = ()) -> ASGIApp:
    """The application.

    Args:
        service: the service.
        keys: the keys with which clients may use `/v1`; empty if they need none.
    """
    encoded = [key.encode() for key in keys]

    def route(path: str, endpoint: Endpoint, method: str, *, is_public: bool = False) -> Route:
        async def run(request: Request) -> Response:
            try:
                if not is_public:
                    _check_key(request, encoded)
                if method == "POST":
                    service.check_ready()
                return await endpoint(request, service)
            except ClientDisconnect:
                return Response(status_code=LEFT)
            except Exception as error:
                return error_of(error).response()

        return Route(path, run, methods=[method])

    routes = [
        route("/v1/chat/completions", Chat().respond, "POST"),
        route("/v1/completions", Completions().respond, "POST"),
        route("/v1/embeddings", embeddings, "POST"),
        route("/v1/models", _models, "GET"),
        route("/v1/models/{name:path}", _model, "GET"),
        route("/health", _health, "GET", is_public=True),
        route("/metrics", _metrics, "GET", is_public=True),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    return Counted(app, service, {route.path for route in routes})


class Counted:
    """Counts the requests of an application by endpoint and status.

    Args:
        app: the application.
        service: has the metrics.
        paths: the endpoints that have counts of their own.
    """

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]):
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, and counts it when it has ended. A stream that fails counts as what it failed with."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                state.setdefault("outcome", message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            # By uvicorn, which ends the server and would print this as a bug: the client took too long to read.
            state["outcome"] = LEFT
            if self._service.state is not State.closing:
                raise
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.add(1, path, str(state.get("outcome", LEFT)))


def _check_key(request: Request, keys: Sequence[bytes]) -> None:
    """Checks the header `Authorization: Bearer KEY`, in a time that does not tell how much of a key was right."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    given = key.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
    if keys and not any([hmac.compare_digest(given, key) for key in keys]):  # all of them, not up to the first
        message = "The API key is missing or wrong. Send the header `Authorization: Bearer KEY`."
        raise RequestError(401, message, code="invalid_api_key")


async def _models(_: Request, service: Service) -> Response:
    return JSONResponse({"object": "list", "data": [_card(service)]})


async def _model(request: Request, service: Service) -> Response:
    name = request.path_params["name"]
    if name != service.name:
        message = f"The model {name!r:.200} does not exist here. This server has {service.name!r}."
        raise RequestError(404, message, param="model", code="model_not_found")
    return JSONResponse(_card(service))


def _card(service: Service) -> dict:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "keras-t5gemma"}


async def _health(_: Request, service: Service) -> Response:
    is_ready = service.state is State.ready
    content = {"status": service.state.name, "message": service.state.value}
    return JSONResponse(content, 200 if is_ready else 503)


async def _metrics(_: Request, service: Service) -> Response:
    return Response(service.metrics.text(service.gauges()), media_type=MEDIA_TYPE)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors, of unknown paths and methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    messages = {404: f"There is no {request.url.path!r:.200} here.", 405: f"{request.method} is not for this path."}
    told = RequestError(error.status_code, messages.get(error.status_code, error.detail), code="unknown_url")
    return told.response()
