"""What both kinds of completions share: from the body to a JSON response, or to a stream of events."""

import abc
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from keras_t5gemma.serving.handles import Answer
from keras_t5gemma.serving.http.bodies import Body, check_model, read_object
from keras_t5gemma.serving.http.choices import Choices, usage
from keras_t5gemma.serving.http.clients import Events, EventStream, unless_left
from keras_t5gemma.serving.http.sampling import Sampling
from keras_t5gemma.serving.http.service import Service


class Form(abc.ABC):
    """The shape of an endpoint's requests and responses.

    Attributes:
        kind: the response's `object`.
        prefix: of the response's id.
        param: the field that holds the prompts.
    """

    kind: str
    prefix: str
    param: str

    @abc.abstractmethod
    def read(self, fields: Mapping[str, Any], service: Service) -> tuple[list, Sampling, Body]:
        """`(prompts, sampling, body)` of the fields of a body. Raises a `RequestError` if one is invalid."""

    @abc.abstractmethod
    def choice(self, answer: Answer, service: Service, has_log_probs: bool) -> dict:
        """A complete choice, without index and reason."""

    @abc.abstractmethod
    def first(self) -> dict | None:
        """What a choice begins with in a stream; None for nothing."""

    @abc.abstractmethod
    def piece(self, text: str) -> dict:
        """A piece of a choice in a stream."""

    @abc.abstractmethod
    def last(self, answer: Answer, service: Service, has_log_probs: bool) -> dict:
        """The end of a choice in a stream. It has the log-probabilities of the whole choice."""

    async def respond(self, request: Request, service: Service) -> Response:
        """Answers a request.

        Raises:
            RequestError: if the request is invalid or fails.
            ClientDisconnect: if the client left.
        """
        fields = await read_object(request)
        prompts, sampling, body = self.read(fields, service)
        check_model(body, service.name)
        choices = Choices(service, prompts, sampling, self.param)
        head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": service.name,
        }
        try:
            await unless_left(request.receive, choices.submit)
            if not sampling.is_stream:
                answers = await unless_left(request.receive, choices.answers)
                counted = _counted(answers, sampling, service)
                # In a thread, as below: texts of many tokens' log-probabilities take a while.
                whole = await run_in_threadpool(self._whole, answers, sampling, service)
                return JSONResponse({**head, "choices": whole, "usage": counted})
            if self.kind == "chat.completion":
                head["object"] = "chat.completion.chunk"
            events = self._events(choices, sampling, service, head)
            first = await unless_left(request.receive, lambda: anext(events))
            return EventStream([first], events)
        except BaseException:
            choices.leave()
            raise

    def _whole(self, answers: list[Answer], sampling: Sampling, service: Service) -> list[dict]:
        return [
            {"index": i, **self.choice(answer, service, sampling.has_log_probs), "finish_reason": answer.finish_reason}
            for i, answer in enumerate(answers)
        ]

    async def _events(self, choices: Choices, sampling: Sampling, service: Service, head: dict) -> Events:
        """The events of a stream. When it is closed, so are the choices."""
        head = {**head, "usage": None} if sampling.has_usage else head
        answers, begun = {}, set()

        def event(index: int, part: dict, reason: str | None = None) -> dict:
            return {**head, "choices": [{"index": index, **part, "finish_reason": reason}]}

        try:
            async for index, text, answer in choices.progress():
                first = self.first()
                if first is not None and index not in begun:
                    begun.add(index)
                    yield event(index, first)
                if text:
                    yield event(index, self.piece(text))
                if answer is not None:
                    answers[index] = answer
                    last = await run_in_threadpool(self.last, answer, service, sampling.has_log_probs)
                    yield event(index, last, answer.finish_reason)
            counted = _counted([answers[index] for index in sorted(answers)], sampling, service)
            if sampling.has_usage:
                yield {**head, "choices": [], "usage": counted}
        finally:
            choices.leave()


def _counted(answers: list[Answer], sampling: Sampling, service: Service) -> dict[str, int]:
    counted = usage(answers, sampling.choices)
    service.metrics.prompt_tokens.add(counted["prompt_tokens"])
    return counted
