"""Tensors to safetensors, one piece at a time, each tensor with its checksum."""

import json
import re
import struct
from pathlib import Path

import numpy as np

from keras_t5gemma.checkpoints.atomic_folder import check_space
from keras_t5gemma.checkpoints.hugging_face.reader import CHECKSUMS_KEY, INDEX_FILE, WEIGHTS_FILE
from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError, check_finite, checksum
from keras_t5gemma.checks import is_integer
from keras_t5gemma.progress import byte_progress

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NO_CHECKSUM = "0" * 16


def write_tensors(folder, source, max_shard_size="5GB", *, allow_non_finite=False, title="Writing"):
    """Writes every tensor of a source as safetensors: one file, or shards with an index.

    A file's header is computed from the shapes and dtypes; then piece after piece of tensor after tensor is read,
    checked and written, so that no more than one piece is in memory where the source can read by pieces. A checksum a
    tensor goes into the header's metadata at the end, where reading compares it.

    Args:
        folder: an existing folder, e.g. that of `new_folder`.
        source: a `TensorSource`; the order of its names is the order of the tensors in the files.
        max_shard_size: bytes of data in a file, an int or a text such as "5GB" or "500MiB"; one tensor may exceed it.
        allow_non_finite: whether tensors may hold infinities and NaNs.
        title: of the progress bar.

    Raises:
        CheckpointError: if a tensor's dtype cannot be written, it is not what the source announced, it is not
            finite, or the disk has no room.
        ValueError: if `max_shard_size` is neither.
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


def write_json(path, value):
    """Writes a JSON file as `transformers` does: indented, keys sorted."""
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(source, limit):
    """Names, cut in order into runs of at most `limit` bytes."""
    shards, size = [[]], 0
    for name in source.names():
        nbytes = source.nbytes(name)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_file(path, source, names, allow_non_finite, advance):
    """Writes one safetensors file: its header, then the tensors in the header's order."""
    checksums = dict.fromkeys(names, _NO_CHECKSUM)
    header = _header(source, names, checksums)
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            checksums[name] = _write_tensor(file, source, name, allow_non_finite, advance)
        # Every checksum has 16 digits, so that the header keeps its length.
        file.seek(0)
        file.write(_header(source, names, checksums))


def _write_tensor(file, source, name, allow_non_finite, advance):
    """Writes one tensor and returns its checksum."""
    shape, dtype, written = tuple(source.shape(name)), source.dtype(name), 0
    found = checksum(name, dtype, shape)
    for piece in source.chunks(name):
        if piece.dtype != dtype:
            raise CheckpointError(
                f"{source.where(name)}: tensor {name!r} was announced as {dtype} and came as {piece.dtype}."
            )
        if not allow_non_finite:
            check_finite(source, name, piece)
        data = piece.view("uint8").data
        found.update(data)
        file.write(data)
        advance(piece.nbytes)
        written += piece.nbytes
    if written != source.nbytes(name):
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} was announced as {dtype} {shape}, {source.nbytes(name)} bytes, and "
            f"came with {written}."
        )
    return found.hexdigest()


def _header(source, names, checksums):
    """The bytes of a header, its length in front, padded so that the data are aligned."""
    formats = {dtype: name for name, dtype in DTYPES.items()}
    # `transformers` wants to be told which library's tensors these are; "pt" is what it writes itself.
    header, position = {"__metadata__": {"format": "pt", CHECKSUMS_KEY: json.dumps(checksums)}}, 0
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
    text += b" " * (-len(text) % 8)  # So that the data are aligned, as the format recommends.
    return struct.pack("<Q", len(text)) + text


def byte_count(size):
    """The bytes that a size says: an int, or a text such as "5GB" or "500MiB".

    Raises:
        ValueError: if it is neither.
    """
    if is_integer(size) and size > 0:
        return int(size)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if match and match[2].upper() in _UNITS and float(match[1]) > 0:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    raise ValueError(f'`max_shard_size` must be a number of bytes or a text such as "5GB". Received: {size!r}.')
