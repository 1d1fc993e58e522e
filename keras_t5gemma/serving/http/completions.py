"""`POST /v1/completions`."""

from collections.abc import Mapping
from typing import Any

from keras_t5gemma.checks import is_integer
from keras_t5gemma.serving.handles import Answer
from keras_t5gemma.serving.http import log_probs
from keras_t5gemma.serving.http.bodies import Body
from keras_t5gemma.serving.http.completing import Form
from keras_t5gemma.serving.http.errors import bad
from keras_t5gemma.serving.http.sampling import FIELDS, Sampling, read_sampling
from keras_t5gemma.serving.http.service import Service

_FIELDS = (*FIELDS, "prompt")
# What the endpoint does not do -> values that do not ask for it.
_NEUTRAL = {"best_of": (1,), "echo": (False,), "logit_bias": ({},), "suffix": ("",)}
# OpenAI's default.
_TOKENS = 16


class Completions(Form):
    """Completions: one prompt or several, each with n choices."""

    kind = "text_completion"
    prefix = "cmpl"
    param = "prompt"

    def read(self, fields: Mapping[str, Any], service: Service) -> tuple[list, Sampling, Body]:
        """As for `Form`. A prompt is read as in `generate`: a chat model reads it as a user's turn."""
        body = Body(fields, _FIELDS, _NEUTRAL)
        prompts = body.required("prompt")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise bad(
                "prompt",
                f"`prompt` must be a text or a list of texts; token ids are not supported. Received: {prompts!r:.200}.",
            )
        expected = "0, for the log-probabilities of the answer's tokens; those of other tokens are not supported"
        of_tokens = body.get("logprobs", None, expected, lambda value: is_integer(value) and value == 0)
        sampling = read_sampling(body, service.longest, default_tokens=_TOKENS, has_log_probs=of_tokens is not None)
        if "best_of" in body and sampling.choices != 1:
            message = f"`best_of` is not supported. Leave it out. Received: best_of=1 with n={sampling.choices}."
            raise bad("best_of", message, "unsupported_parameter")
        return prompts, sampling, body

    def choice(self, answer: Answer, service: Service, has_log_probs: bool) -> dict:
        """As for `Form`."""
        return {"text": answer.text, "logprobs": _log_probs(answer, service, has_log_probs)}

    def first(self) -> None:
        """As for `Form`: a stream begins with text."""
        return None

    def piece(self, text: str) -> dict:
        """As for `Form`."""
        return {"text": text, "logprobs": None}

    def last(self, answer: Answer, service: Service, has_log_probs: bool) -> dict:
        """As for `Form`."""
        return {"text": "", "logprobs": _log_probs(answer, service, has_log_probs)}


def _log_probs(answer: Answer, service: Service, has_log_probs: bool) -> dict | None:
    return log_probs.for_completion(service.preprocessor, answer) if has_log_probs else None
