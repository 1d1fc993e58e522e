"""`POST /v1/embeddings`."""

import base64
import threading
from functools import partial

import anyio
import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from keras_t5gemma.serving.http.bodies import Body, check_model, read_object
from keras_t5gemma.serving.http.clients import unless_left
from keras_t5gemma.serving.http.errors import RequestError, bad, error_of
from keras_t5gemma.serving.http.service import Service

_FIELDS = ("model", "input", "encoding_format", "dimensions")
# As many as OpenAI's.
_MOST_TEXTS = 2048


async def embeddings(request: Request, service: Service) -> Response:
    """Vectors of texts: the mean of the encoder's output, of length 1.

    Raises:
        RequestError: if the request is invalid or fails.
        ClientDisconnect: if the client left.
    """
    body = Body(await read_object(request), _FIELDS, {})
    texts = _texts(body)
    encoding = body.get("encoding_format", "float", " or ".join(_ENCODINGS), lambda name: name in list(_ENCODINGS))
    dimensions = body.integer("dimensions", None, 1, service.vectors.width)
    check_model(body, service.name)
    if service.open_embeddings >= service.most_waiting:
        message = f"{service.open_embeddings} requests for embeddings are open. Send the request again later."
        raise RequestError(429, message, code="queue_full", kind="rate_limit_error")
    service.open_embeddings += 1
    try:
        rows, vectors = await unless_left(request.receive, lambda: _embedded(service, texts, dimensions))
    finally:
        service.open_embeddings -= 1
    tokens = sum(map(len, rows))
    service.metrics.prompt_tokens.add(tokens)
    data = [
        {"object": "embedding", "index": i, "embedding": _ENCODINGS[encoding](vector)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})


async def _embedded(service: Service, texts: list[str], dimensions: int | None) -> tuple[list, np.ndarray]:
    left = threading.Event()
    try:
        rows = await run_in_threadpool(service.vectors.rows, texts)
        async with service.embeds:
            # A client that leaves, or a server that stops, does not wait for the model, whose thread then ends early.
            embed = partial(service.vectors.embed, rows, dimensions, left)
            return rows, await anyio.to_thread.run_sync(embed, abandon_on_cancel=True)
    except Exception as error:
        raise error_of(error, "input") from error
    finally:
        left.set()


def _texts(body: Body) -> list[str]:
    texts = body.required("input")
    texts = [texts] if isinstance(texts, str) else texts
    is_list = isinstance(texts, list) and 0 < len(texts) <= _MOST_TEXTS
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise bad(
            "input",
            f"`input` must be a text or a list of 1 to {_MOST_TEXTS} texts; token ids are not supported. Received: "
            f"{texts!r:.200}.",
        )
    return texts


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


_ENCODINGS = {"float": np.ndarray.tolist, "base64": _base64}
