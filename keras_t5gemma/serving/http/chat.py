"""`POST /v1/chat/completions`."""

from collections.abc import Mapping
from typing import Any

from keras_t5gemma.serving.handles import Answer
from keras_t5gemma.serving.http import log_probs
from keras_t5gemma.serving.http.bodies import Body
from keras_t5gemma.serving.http.completing import Form
from keras_t5gemma.serving.http.errors import bad
from keras_t5gemma.serving.http.sampling import FIELDS, Sampling, read_sampling
from keras_t5gemma.serving.http.service import Service
from keras_t5gemma.suggestions import did_you_mean

_FIELDS = (*FIELDS, "messages", "max_completion_tokens")
# What the endpoint does not do -> values that do not ask for it.
_NEUTRAL = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
_MESSAGE = ("role", "content")


class Chat(Form):
    """Chat completions: one conversation, of which each choice is a next message."""

    kind = "chat.completion"
    prefix = "chatcmpl"
    param = "messages"

    def read(self, fields: Mapping[str, Any], service: Service) -> tuple[list, Sampling, Body]:
        """As for `Form`. The conversation is formatted by the preprocessor, as in `generate`."""
        body = Body(fields, _FIELDS, _NEUTRAL)
        messages = body.required("messages")
        if not isinstance(messages, list) or not messages:
            raise bad("messages", f"`messages` must be a list of messages. Received: {messages!r:.200}.")
        conversation = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        sampling = read_sampling(
            body,
            service.longest,
            default_tokens=None,
            has_log_probs=body.boolean("logprobs"),
            limits=("max_tokens", "max_completion_tokens"),
        )
        return [conversation], sampling, body

    def choice(self, answer: Answer, service: Service, has_log_probs: bool) -> dict:
        """As for `Form`."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"message": message, "logprobs": _log_probs(answer, service, has_log_probs)}

    def first(self) -> dict:
        """As for `Form`."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, text: str) -> dict:
        """As for `Form`."""
        return {"delta": {"content": text}, "logprobs": None}

    def last(self, answer: Answer, service: Service, has_log_probs: bool) -> dict:
        """As for `Form`."""
        return {"delta": {}, "logprobs": _log_probs(answer, service, has_log_probs)}


def _log_probs(answer: Answer, service: Service, has_log_probs: bool) -> dict | None:
    return log_probs.for_chat(service.preprocessor, answer) if has_log_probs else None


def _message(message: Any, place: str) -> dict:
    """A message with a text as its content. Roles and turns are checked by the preprocessor."""
    if not isinstance(message, dict):
        raise bad("messages", f'`{place}` must be {{"role": ..., "content": ...}}. Received: {message!r:.200}.')
    fields = {name: value for name, value in message.items() if value not in (None, [])}
    for name in fields:
        if name not in _MESSAGE:
            near = did_you_mean(name, _MESSAGE)
            raise bad("messages", f"`{place}.{name}` is not supported. A message has role and content.{near}")
    for name in _MESSAGE:
        if name not in fields:
            raise bad("messages", f"`{place}.{name}` is missing.", "missing_required_parameter")
    content = fields["content"]
    if isinstance(content, list):
        content = "".join(_text(part, f"{place}.content[{i}]") for i, part in enumerate(content))
    return {"role": fields["role"], "content": content}


def _text(part: Any, place: str) -> str:
    """The text of a part of a content."""
    is_text = isinstance(part, dict) and part.get("type") == "text" and set(part) == {"type", "text"}
    if not is_text or not isinstance(part["text"], str):
        raise bad("messages", f'`{place}` must be {{"type": "text", "text": ...}}. Received: {part!r:.200}.')
    return part["text"]
