"""A SentencePiece model as plain values: its pieces and settings, read from the bytes without a protobuf library.

The numbers of fields and types are those of `sentencepiece_model.proto`.
"""

import dataclasses
import struct
from collections.abc import Iterator
from typing import Any

from keras_t5gemma.checkpoints.tensor_source import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of a vocabulary.

    Attributes:
        text: the piece, with `▁` for a space.
        score: of two possible merges, that with the higher score comes first.
        kind: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE.
    """

    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a SentencePiece model that determine the ids of a text.

    Attributes:
        pieces: a tuple of `Piece`; the index is the id.
        model_type: `BPE`, or another algorithm.
        byte_fallback: whether characters outside the vocabulary become bytes.
        whitespace_is_suffix: whether spaces end words instead of starting them.
        has_charsmap: whether characters are normalized.
        dummy_prefix: whether a space is put before each text.
        removes_extra_whitespace: whether spaces at the ends and runs of spaces are removed.
        escapes_whitespace: whether a space becomes `▁`.
    """

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    whitespace_is_suffix: bool
    has_charsmap: bool
    dummy_prefix: bool
    removes_extra_whitespace: bool
    escapes_whitespace: bool


def parse_proto(proto: bytes) -> SentencePieceModel:
    """Reads a SentencePiece model.

    Raises:
        CheckpointError: if the bytes are not one.
    """
    try:
        fields = list(_fields(proto))
        trainer = dict(_fields(b"".join(value for number, value in fields if number == 2)))
        normalizer = dict(_fields(b"".join(value for number, value in fields if number == 3)))
        pieces = [_piece(dict(_fields(value))) for number, value in fields if number == 1]
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"The tokenizer is not a SentencePiece model: {error}") from error
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, False)),
        whitespace_is_suffix=bool(trainer.get(24, False)),
        has_charsmap=bool(normalizer.get(2)),
        dummy_prefix=bool(normalizer.get(3, True)),
        removes_extra_whitespace=bool(normalizer.get(4, True)),
        escapes_whitespace=bool(normalizer.get(5, True)),
    )


def _piece(fields: dict[int, Any]) -> Piece:
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message in protobuf's wire format: numbers, with an integer or bytes each."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + size > len(data):
            raise ValueError(f"it ends within a field, at byte {position}")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of variable length, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
