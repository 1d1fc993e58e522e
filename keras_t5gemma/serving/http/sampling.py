"""The fields that completions and chat completions share: how to choose tokens, and what to return."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_t5gemma.serving.http.bodies import Body
from keras_t5gemma.serving.http.errors import bad
from keras_t5gemma.text.stop_strings import checked_stops

FIELDS = (
    "model",
    "stream",
    "stream_options",
    "n",
    "seed",
    "stop",
    "temperature",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "logprobs",
)
# As many choices as OpenAI's.
_MOST_CHOICES = 128


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a request says about its answers.

    Attributes:
        choices: n, answers per prompt.
        seed: of the first choice; None for random ones.
        has_log_probs: whether log-probabilities are returned.
        is_stream: whether the answer is sent in pieces.
        has_usage: whether a stream ends with the numbers of tokens.
        options: further arguments of `Batcher.submit`.
    """

    choices: int
    seed: int | None
    has_log_probs: bool
    is_stream: bool
    has_usage: bool
    options: Mapping[str, Any]

    def options_of(self, choice: int) -> dict[str, Any]:
        """The arguments of `Batcher.submit` for one of the choices: choice i has the seed `seed + i`."""
        seed = None if self.seed is None else self.seed + choice
        return {**self.options, "seed": seed, "return_log_probs": self.has_log_probs, "strip_prompt": True}


def read_sampling(
    body: Body,
    longest: int,
    *,
    default_tokens: int | None,
    has_log_probs: bool,
    limits: tuple[str, ...] = ("max_tokens",),
) -> Sampling:
    """Reads and checks the shared fields.

    Args:
        body: the body.
        longest: the most tokens of an answer.
        default_tokens: how many tokens an answer has if the body does not say it; None for `longest`.
        has_log_probs: whether the body asks for log-probabilities.
        limits: the fields that bound the number of tokens.

    Raises:
        RequestError: if a field is invalid; it names the field.
    """
    is_stream = body.boolean("stream")
    temperature = body.number("temperature", 1.0, 0, 2)
    top_p = body.get("top_p", None, "a number above 0 and at most 1", _is_share)
    options = {
        "max_new_tokens": _tokens(body, limits, longest, min(default_tokens or longest, longest)),
        "temperature": temperature,
        "top_k": body.integer("top_k", None, 1),
        "top_p": top_p,
        "stop": _stops(body),
        "presence_penalty": body.number("presence_penalty", 0.0, -2, 2),
        "frequency_penalty": body.number("frequency_penalty", 0.0, -2, 2),
        "repetition_penalty": body.number("repetition_penalty", 1.0, 0.01, 100),
    }
    return Sampling(
        choices=body.integer("n", 1, 1, _MOST_CHOICES) or 1,
        seed=body.integer("seed", None, 0),
        has_log_probs=has_log_probs,
        is_stream=is_stream,
        has_usage=_has_usage(body, is_stream),
        options=options,
    )


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _tokens(body: Body, names: tuple[str, ...], longest: int, default: int) -> int:
    """The most tokens of an answer."""
    given = {name: body.integer(name, None, 1, longest) for name in names if name in body}
    if len(set(given.values())) > 1:
        raise bad(
            names[-1], f"{' and '.join(f'`{name}`' for name in given)} differ. Pass one of them. Received: {given}."
        )
    return next((value for value in given.values() if value is not None), default)


def _stops(body: Body) -> tuple[str, ...]:
    try:
        return checked_stops(body.get("stop", None, "a text or a list of texts", lambda _: True))
    except ValueError as error:
        raise bad("stop", str(error)) from error


def _has_usage(body: Body, is_stream: bool) -> bool:
    options = body.get("stream_options", {}, "an object", lambda value: isinstance(value, dict))
    if options and not is_stream:
        raise bad("stream_options", f"`stream_options` needs stream=true. Received: {options!r:.200}.")
    unknown = set(options) - {"include_usage", "include_obfuscation"}
    has_usage, obfuscates = options.get("include_usage") or False, options.get("include_obfuscation") or False
    if unknown or not isinstance(has_usage, bool) or obfuscates:
        raise bad(
            "stream_options",
            f"`stream_options` may hold include_usage, true or false, and nothing else. Received: {options!r:.200}.",
        )
    return has_usage
