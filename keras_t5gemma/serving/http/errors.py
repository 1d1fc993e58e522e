"""Errors in OpenAI's shape."""

import logging
from concurrent.futures import CancelledError

from starlette.responses import JSONResponse

from keras_t5gemma.serving.handles import BatcherClosed, QueueFull

_LOG = logging.getLogger(__name__)
_INVALID = "invalid_request_error"


class RequestError(Exception):
    """An error that the client is told about.

    Args:
        status: of HTTP.
        message: a sentence that says what would work.
        param: the field in question, or None.
        code: a word for programs, or None.
        kind: OpenAI's `type` of the error.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind=_INVALID):
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind

    @property
    def body(self) -> dict:
        """The JSON of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response. A client may try again after a second if the server was busy."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def bad(param: str, message: str, code: str | None = "invalid_value") -> RequestError:
    """The error of a field that cannot be accepted."""
    return RequestError(400, message, param=param, code=code)


def unavailable(message: str, code: str) -> RequestError:
    """The error of a server that cannot answer now."""
    return RequestError(503, message, code=code, kind="service_unavailable")


def error_of(error: BaseException, param: str | None = None) -> RequestError:
    """The `RequestError` for an exception of the batcher or of the model.

    Args:
        error: the exception.
        param: the field that holds the prompt: options were checked before, so that a `ValueError` is the prompt's.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ValueError) and param is not None:
        return bad(param, str(error))
    if isinstance(error, QueueFull):
        return RequestError(429, str(error), code="queue_full", kind="rate_limit_error")
    if isinstance(error, MemoryError):
        return unavailable(str(error), "out_of_memory")
    if isinstance(error, (BatcherClosed, CancelledError)):
        return unavailable("The server stopped before it could answer.", "stopped")
    # Details of other errors are for the log, not for clients.
    _LOG.error("A request failed.", exc_info=error)
    return RequestError(500, "The server failed to answer this request.", code="failed", kind="server_error")
