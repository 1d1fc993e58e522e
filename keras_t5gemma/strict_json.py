"""JSON objects from untrusted files: the names are unique, and the numbers and the file have a limited size."""

import json
import os
from pathlib import Path

# Bytes per file: the limit of safetensors' headers.
MAX_BYTES = 100_000_000
# Digits per integer: 64 bits, more than any size needs. Products and messages of longer ones would fail.
_MAX_DIGITS = 20


def read_object(path: str | os.PathLike[str]) -> dict:
    """Reads the JSON object in a file, as a dict.

    Raises:
        ValueError: if the file is missing or does not hold a JSON object.
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


def parse_object(text: str | bytes, where: str) -> dict:
    """Parses a JSON object to a dict.

    Args:
        text: the JSON text.
        where: the origin of the text, for the message.

    Returns:
        The object as a dict.

    Raises:
        ValueError: if the text is not a JSON object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_dict_of_unique_names, parse_int=_limited_integer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error!s:.400}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a JSON {type(value).__name__}. Expected an object.")
    return value


def _dict_of_unique_names(pairs: list[tuple[str, object]]) -> dict:
    """A dict of an object's pairs. Refuses duplicate names, of which Python would silently keep the last."""
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the name {name!r} comes twice")
        values[name] = value
    return values


def _limited_integer(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"the number {text[:_MAX_DIGITS]}... has {len(text)} digits")
    return int(text)
