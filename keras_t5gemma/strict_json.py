"""JSON objects from untrusted files: unique names, no absurd numbers, of limited size."""

import json
from pathlib import Path

# Bytes of a file: the limit of safetensors' headers.
MAX_BYTES = 100_000_000
# Digits of an integer: 64 bits, more than any size. Of longer ones neither products nor messages could be made.
_MAX_DIGITS = 20


def read_object(path):
    """The JSON object in a file, as a dict.

    Raises:
        ValueError: if the file is missing or holds anything else.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size > MAX_BYTES:
                raise ValueError(f"{path} has {size} bytes. Expected JSON of at most {MAX_BYTES}.")
            file.seek(0)
            text = file.read(size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    return parse_object(text, str(path))


def parse_object(text, where):
    """The JSON object in a text, as a dict; `where` is for the message.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error!s:.400}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a JSON {type(value).__name__}. Expected an object.")
    return value


def _unique(pairs):
    """A dict of JSON's pairs, refusing names that come twice, of which Python would keep the last in silence."""
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the name {name!r} comes twice")
        values[name] = value
    return values


def _integer(text):
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"the number {text[:_MAX_DIGITS]}... has {len(text)} digits")
    return int(text)
