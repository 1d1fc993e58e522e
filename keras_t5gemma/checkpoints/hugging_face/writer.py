"""Tensors to safetensors, one piece at a time, each tensor with its checksum."""

import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from keras_t5gemma.checkpoints.atomic_folder import check_space
from keras_t5gemma.checkpoints.hugging_face.reader import CHECKSUMS_KEY, INDEX_FILE, WEIGHTS_FILE
from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError, TensorSource, check_finite, checksum
from keras_t5gemma.checks import is_integer
from keras_t5gemma.progress import byte_progress

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NO_CHECKSUM = "0" * 16


def write_tensors(
    folder: str | os.PathLike[str],
    source: TensorSource,
    max_shard_size: int | str = "5GB",
    *,
    allow_non_finite: bool = False,
    title: str = "Writing",
) -> None:
    """Writes every tensor of a source as safetensors: one file, or shards with an index.

    A file's header is computed from the shapes and dtypes. Then the tensors are read, checked and written one after the
    other, piece by piece, so only one piece is in memory if the source can read pieces. At the end one checksum per
    tensor goes into the header's metadata, and readers compare it.

    Args:
        folder: an existing folder, e.g. that of `new_folder`.
        source: a `TensorSource`; the order of its names is the order of the tensors in the files.
        max_shard_size: bytes of data per file, an int or a text such as "5GB" or "500MiB"; one tensor may exceed it.
        allow_non_finite: whether tensors may hold infinities and NaNs.
        title: title of the progress bar.

    Raises:
        CheckpointError: if a tensor's dtype cannot be written, a tensor is not as the source announced it or is not
            finite, or the disk is full.
        ValueError: if `max_shard_size` is invalid.
    """
    folder = Path(folder)
    shards = _shards(source, byte_count(max_shard_size))
    total = sum(map(source.nbytes, source.names()))
    check_space(folder, total)
    files = [WEIGHTS_FILE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with byte_progress(title, total) as advance:
        for file, names in zip(files, shards, strict=True):
            _write_file(folder / file, source, names, allow_non_finite, advance)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        write_json(folder / INDEX_FILE, index)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file as `transformers` does: indented, keys sorted."""
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(source: TensorSource, limit: int) -> list[list[str]]:
    """The names of the tensors in each shard: in order, as many as `limit` bytes hold, but at least one."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.names():
        nbytes = source.nbytes(name)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_file(
    path: Path, source: TensorSource, names: Sequence[str], allow_non_finite: bool, advance: Callable[[int], None]
) -> None:
    """Writes one safetensors file: its header, then the tensors in the header's order, then the checksums.

    Args:
        path: the file to create.
        source: the source of the tensors.
        names: the tensors of this file, in order.
        allow_non_finite: whether tensors may hold infinities and NaNs.
        advance: called with the number of bytes of each piece written.
    """
    checksums = dict.fromkeys(names, _NO_CHECKSUM)
    header = _header(source, names, checksums)
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            checksums[name] = _write_tensor(file, source, name, allow_non_finite, advance)
        # The header keeps its length, because every checksum has 16 digits.
        file.seek(0)
        file.write(_header(source, names, checksums))


def _write_tensor(
    file: BinaryIO, source: TensorSource, name: str, allow_non_finite: bool, advance: Callable[[int], None]
) -> str:
    """Writes one tensor and returns its checksum; the arguments are those of `_write_file`."""
    shape, dtype, written = tuple(source.shape(name)), source.dtype(name), 0
    digest = checksum(name, dtype, shape)
    for piece in source.chunks(name):
        if piece.dtype != dtype:
            raise CheckpointError(
                f"{source.where(name)}: tensor {name!r} was announced as {dtype} and came as {piece.dtype}."
            )
        if not allow_non_finite:
            check_finite(source, name, piece)
        data = piece.view("uint8").data
        digest.update(data)
        file.write(data)
        advance(piece.nbytes)
        written += piece.nbytes
    if written != source.nbytes(name):
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} was announced as {dtype} {shape}, {source.nbytes(name)} bytes, and "
            f"came with {written}."
        )
    return digest.hexdigest()


def _header(source: TensorSource, names: Sequence[str], checksums: Mapping[str, str]) -> bytes:
    """The header of a file as bytes: its length, then its JSON text, padded so that the data are aligned.

    Args:
        source: the source of the tensors.
        names: the tensors of the file, in order.
        checksums: 16 hexadecimal digits per tensor.
    """
    formats = {dtype: name for name, dtype in DTYPES.items()}
    # `transformers` needs the name of a library in "format", and writes "pt" itself.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", CHECKSUMS_KEY: json.dumps(checksums)}}
    position = 0
    for name in names:
        dtype, end = np.dtype(source.dtype(name)), position + source.nbytes(name)
        if dtype not in formats:
            raise CheckpointError(
                f"{source.where(name)}: tensor {name!r} has dtype {dtype}. Expected one of {[str(d) for d in formats]}."
            )
        header[name] = {
            "dtype": formats[dtype],
            "shape": list(source.shape(name)),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Aligned as the format recommends.
    return struct.pack("<Q", len(text)) + text


def byte_count(size: int | str) -> int:
    """The number of bytes of a size: an int, or a text such as "5GB" or "500MiB".

    Raises:
        ValueError: if it is neither.
    """
    if is_integer(size) and int(size) > 0:
        return int(size)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if match and match[2].upper() in _UNITS and float(match[1]) > 0:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    raise ValueError(f'`max_shard_size` must be a number of bytes or a text such as "5GB". Received: {size!r}.')
