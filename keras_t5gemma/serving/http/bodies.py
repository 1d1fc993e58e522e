"""The JSON body of a request: its fields, checked before anything is computed."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from keras_t5gemma.checks import is_integer, is_number
from keras_t5gemma.serving.http.errors import RequestError, bad
from keras_t5gemma.strict_json import parse_object
from keras_t5gemma.suggestions import did_you_mean

# Bytes: some hundred times what a prompt of 8,192 tokens takes.
MOST_BYTES = 8 * 2**20
# Fields that concern bills, caches and statistics of OpenAI, and change no answer.
_HARMLESS = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "service_tier",
    "prediction",
    "parallel_tool_calls",
)


class Body:
    """The fields of a request's body. A field that is null is as one that was left out.

    Args:
        fields: the JSON object.
        known: the fields that the endpoint reads.
        neutral: fields that it does not support -> the values that ask for nothing.

    Raises:
        RequestError: if a field is unknown, or asks for something that is not supported.
    """

    def __init__(self, fields: Mapping[str, Any], known: tuple[str, ...], neutral: Mapping[str, tuple]):
        self._fields = {name: value for name, value in fields.items() if value is not None}
        for name, value in self._fields.items():
            if name in known or name in _HARMLESS:
                continue
            if name not in neutral:
                near = did_you_mean(name, known)
                raise bad(name, f"Unknown field `{name}`. Known: {', '.join(known)}.{near}", "unknown_parameter")
            # By type too: 0 is not False.
            if not any(value == allowed and type(value) is type(allowed) for allowed in neutral[name]):
                values = "".join(f"{allowed!r}, " for allowed in neutral[name])
                raise bad(
                    name,
                    f"`{name}` is not supported, and would change the answer. Leave it out{values and ' or pass '}"
                    f"{values.removesuffix(', ')}. Received: {value!r:.200}.",
                    "unsupported_parameter",
                )

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def required(self, name: str) -> Any:
        """The value of a field that must be there."""
        if name not in self._fields:
            raise bad(name, f"The field `{name}` is missing.", "missing_required_parameter")
        return self._fields[name]

    def get(self, name: str, default: Any, expected: str, is_valid: Callable[[Any], bool]) -> Any:
        """The value of a field.

        Args:
            name: the field.
            default: of a field that was left out.
            expected: valid values, in words.
            is_valid: whether a value is one of them.

        Raises:
            RequestError: if the value is invalid.
        """
        if name not in self._fields:
            return default
        value = self._fields[name]
        if not is_valid(value):
            raise bad(name, f"`{name}` must be {expected}. Received: {name}={value!r:.200}.")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """The value of a field that is a number within bounds."""
        expected = f"a number from {least:g} to {most:g}"
        return float(self.get(name, default, expected, lambda value: is_number(value) and least <= value <= most))

    def integer(self, name: str, default: int | None, least: int, most: int | None = None) -> int | None:
        """The value of a field that is an integer within bounds."""
        expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
        return self.get(
            name,
            default,
            expected,
            lambda value: is_integer(value) and least <= value <= (value if most is None else most),
        )

    def boolean(self, name: str) -> bool:
        """The value of a field that is true or false; False if it was left out."""
        return self.get(name, False, "true or false", lambda value: isinstance(value, bool))


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request.

    Raises:
        RequestError: if the body is too large, or is not a JSON object.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise RequestError(413, f"The body may have {MOST_BYTES} bytes. This one has more.", code="too_large")
        parts.append(part)
    try:
        fields = parse_object(b"".join(parts), "The body")
        # JSON can hold halves of surrogate pairs, of which no tokenizer makes tokens, and no encoding an answer.
        json.dumps(fields, ensure_ascii=False).encode()
        return fields
    except ValueError as error:
        raise RequestError(400, str(error), code="invalid_json") from error


def check_model(body: Body, name: str) -> None:
    """Checks the field `model`.

    Raises:
        RequestError: if it is missing or is not the name of the served model.
    """
    model = body.required("model")
    if model != name:
        raise RequestError(
            404,
            f"The model {model!r:.200} does not exist here. This server has {name!r}.",
            param="model",
            code="model_not_found",
        )
