"""A Hugging Face folder as a lazy `TensorSource`: every file is checked, one tensor is read at a time.

safetensors only: nothing is ever unpickled. The format (https://huggingface.co/docs/safetensors): 8 bytes, little
endian, with the header's length; the header, a JSON object {name: {dtype, shape, data_offsets}} and, optionally,
`__metadata__`; then the data, without holes. This module parses the format itself, so that every fault becomes one
`CheckpointError` that names the file and the tensor, and so that only the requested tensor is in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np

from keras_t5gemma import strict_json
from keras_t5gemma.checkpoints.tensor_source import CHUNK_BYTES, DTYPES, CheckpointError, TensorSource, checksum

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The format's own limit on a header; it also keeps a corrupt length from filling memory.
MAX_HEADER_BYTES = strict_json.MAX_BYTES
# The key in the header's `__metadata__` for the digits of `tensor_source.checksum`, as JSON text {name: 16 hexadecimal
# digits}.
CHECKSUMS_KEY = "xxh3_64"


class CheckpointFolder(TensorSource):
    """The tensors of a Hugging Face folder, in one safetensors file or in shards with an index.

    Opening reads the headers only. If both forms are there, `model.safetensors` is read, as in `transformers`.

    Args:
        folder: the folder's path.
        config: the parsed `config.json` of the folder, or None to read it at first use.

    Raises:
        CheckpointError: if there are no weights in safetensors, a shard is missing or damaged, the index names a
            file outside the folder, or index and shards disagree about which tensors they hold.
    """

    def __init__(self, folder: str | os.PathLike[str], config: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self._config = config
        if (self.folder / WEIGHTS_FILE).is_file():
            file = SafetensorsFile(self.folder / WEIGHTS_FILE)
            self._files: dict[str, SafetensorsFile] = dict.fromkeys(file.tensors, file)
        elif (self.folder / INDEX_FILE).is_file():
            self._files = self._open_shards()
        else:
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            raise CheckpointError(
                f"{self.folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}."
                + (f" {', '.join(pickled)} would have to be unpickled, which is never done." if pickled else "")
            )

    @property
    def config(self) -> dict[str, Any]:
        """The parsed `config.json` of the folder."""
        if self._config is None:
            self._config = read_json(self.folder / "config.json")
        return self._config

    def names(self) -> list[str]:
        """The tensors' names, in the order of the file or of the index."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        return self._file(name).tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The numpy dtype of one tensor, from the header. Other dtypes than those of weights are an error."""
        return self._file(name).dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a new numpy array."""
        return self._file(name).read(name)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Reads one tensor in flat pieces, each when it is needed."""
        return self._file(name).chunks(name)

    def has_checksum(self, name: str) -> bool:
        """Whether the file states the tensor's checksum, so that reading notices a single flipped bit."""
        return name in self._file(name).checksums

    def where(self, name: str | None = None) -> str:
        """The path of the file that holds the tensor; without a name, of the folder."""
        return str(self.folder if name is None else self._file(name).path)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}.")
        return self._files[name]

    def _open_shards(self) -> dict[str, SafetensorsFile]:
        """Opens the shards, compares them with the index, and returns the shard of each tensor."""
        index = self.folder / INDEX_FILE
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no `weight_map` from tensor names to files.")
        shards: dict[str, SafetensorsFile] = {}
        for name, file in weight_map.items():
            if not is_plain_name(file, ".safetensors"):
                raise CheckpointError(
                    f"{index}: tensor {name!r} is said to be in {file!r:.200}. Expected the plain name of a "
                    f".safetensors file in the same folder."
                )
            if file not in shards:
                shards[file] = SafetensorsFile(self.folder / file)
            if name not in shards[file].tensors:
                raise CheckpointError(f"{self.folder / file} holds no tensor {name!r}, which {index.name} puts there.")
        for file, shard in shards.items():
            if unlisted := [name for name in shard.tensors if weight_map.get(name) != file]:
                raise CheckpointError(
                    f"{shard.path} holds {len(unlisted)} tensor(s) that {index.name} does not put there, among them "
                    f"{unlisted[0]!r}."
                )
        return {name: shards[file] for name, file in weight_map.items()}


class Entry:
    """One tensor of a header: its format dtype (e.g. "BF16"), shape and byte range within the file."""

    __slots__ = ("begin", "end", "format_dtype", "shape")

    def __init__(self, format_dtype: str, shape: tuple[int, ...], begin: int, end: int):
        self.format_dtype, self.shape, self.begin, self.end = format_dtype, shape, begin, end


class SafetensorsFile:
    """One safetensors file. Opening checks the whole header; the data are read one tensor at a time.

    Args:
        path: the file's path.

    Raises:
        CheckpointError: if the file is missing, truncated or longer than its header says, or the header is invalid.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            if self.path.exists() and not self.path.is_file():
                # Reading a pipe would block, and reading a device would never end.
                raise CheckpointError(f"{self.path} cannot be read: it is not a file.")
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                    raise CheckpointError(
                        f"{self.path} is truncated or not a safetensors file: {size} bytes, and the first 8 announce "
                        f"a header of {length}."
                    )
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        header = _json_object(text, f"The header of {self.path}")
        metadata = header.pop("__metadata__", None) or {}
        self.tensors = self._parse(header, 8 + length, size)
        self.checksums = self._parse_checksums(metadata)

    def dtype(self, name: str) -> np.dtype:
        """The numpy dtype of one tensor."""
        format_dtype = self.tensors[name].format_dtype
        if format_dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {format_dtype:.80}. Expected one of {list(DTYPES)}."
            )
        return DTYPES[format_dtype]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a new numpy array."""
        entry, dtype = self.tensors[name], self.dtype(name)
        array = np.empty(math.prod(entry.shape), dtype)
        flat, step = array.view("uint8"), CHUNK_BYTES
        for _ in self._fill(name, (flat[start : start + step] for start in range(0, flat.size, step))):
            pass
        return array.reshape(entry.shape)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Reads one tensor in flat pieces, each when it is needed."""
        entry, dtype = self.tensors[name], self.dtype(name)
        buffer, nbytes = np.empty(CHUNK_BYTES, "uint8"), entry.end - entry.begin
        sizes = [min(CHUNK_BYTES, nbytes - start) for start in range(0, nbytes, CHUNK_BYTES)]
        for piece in self._fill(name, (buffer[:size] for size in sizes)):
            yield piece.view(dtype)

    def _fill(self, name: str, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Reads a tensor's bytes into byte arrays, one after the other, and compares the checksum after the last.

        Args:
            name: the tensor's name.
            pieces: byte arrays, whose sizes add up to the tensor's.

        Yields:
            Each of `pieces`, filled.
        """
        entry = self.tensors[name]
        digest = checksum(name, self.dtype(name), entry.shape) if name in self.checksums else None
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.begin)
                for piece in pieces:
                    if _read_into(file, piece) < piece.size:
                        raise CheckpointError(f"{self.path}: tensor {name!r} ends early: the file is truncated.")
                    if digest is not None:
                        digest.update(piece.data)
                    yield piece
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error.strerror or error}.") from error
        if digest is not None and self.checksums[name] != digest.hexdigest():
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has the checksum {digest.hexdigest()}, but the file states "
                f"{self.checksums[name]!r:.80}: its data or its description were changed."
            )

    def _parse_checksums(self, metadata: Any) -> dict[str, Any]:
        """The checksums in the header's metadata, by tensor; an empty dict if the file states none."""
        if not isinstance(metadata, dict):
            raise CheckpointError(f"The header of {self.path} has {metadata!r:.80} as `__metadata__`.")
        if CHECKSUMS_KEY not in metadata:
            return {}
        text = metadata[CHECKSUMS_KEY]
        where = f"{CHECKSUMS_KEY} in the header of {self.path}"
        checksums = _json_object(text if isinstance(text, str) else "", where)
        if different := sorted(checksums.keys() ^ self.tensors.keys()):
            raise CheckpointError(f"{where} and the file's tensors differ, among them in {different[0]!r}.")
        return checksums

    def _parse(self, header: Mapping[str, Any], data_begin: int, size: int) -> dict[str, Entry]:
        """The entries of a header, after checking that their data fill the file without holes or overlaps.

        Args:
            header: the parsed header without `__metadata__`.
            data_begin: the position of the first byte of data in the file.
            size: the file's size in bytes.
        """
        tensors = {}
        for name, value in header.items():
            tensors[name] = self._entry(name, value, data_begin)
        position = data_begin
        for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                raise CheckpointError(f"{self.path}: tensor {name!r} overlaps another or leaves a hole before it.")
            position = entry.end
        if position != size:
            last = max(tensors, key=lambda name: tensors[name].end, default=None)
            raise CheckpointError(
                f"{self.path} has {size} bytes, but its header describes {position}"
                + (f": truncated within or before tensor {last!r}." if size < position else ".")
            )
        return tensors

    def _entry(self, name: str, value: Any, data_begin: int) -> Entry:
        """Checks and converts one tensor's entry of the header.

        Args:
            name: the tensor's name.
            value: the entry as parsed.
            data_begin: the position of the first byte of data in the file.
        """
        fields = _entry_fields(value)
        if fields is None:
            raise CheckpointError(
                f"{self.path}: the header's entry for tensor {name!r} is {value!r:.200}. Expected dtype, shape and "
                f"data_offsets."
            )
        format_dtype, shape, begin, end = fields
        if format_dtype in DTYPES and math.prod(shape) * DTYPES[format_dtype].itemsize != end - begin:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has {end - begin} bytes, which do not make {format_dtype} of "
                f"shape {shape!r:.200}."
            )
        return Entry(format_dtype, tuple(shape), data_begin + begin, data_begin + end)


def _entry_fields(value: Any) -> tuple[str, list[int], int, int] | None:
    """Dtype, shape, begin and end in a header's entry, or None if the entry is invalid."""
    try:
        format_dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
        has_types = isinstance(format_dtype, str) and isinstance(shape, list)
        valid = has_types and all(type(n) is int and n >= 0 for n in numbers) and begin <= end
    except (TypeError, KeyError, ValueError):
        return None
    return (format_dtype, shape, begin, end) if valid else None


def _read_into(file: RawIOBase, piece: np.ndarray) -> int:
    """Fills a byte array from an unbuffered file, whose reads may be short; returns the number of bytes read."""
    view, filled = piece.data, 0
    while filled < len(view) and (count := file.readinto(view[filled:])):
        filled += count
    return filled


def is_plain_name(file: Any, suffix: str) -> bool:
    """Whether a file in an index is a plain name with the given suffix, so that it is in the index's own folder.

    A path could lead out of the folder, and no program writes one. Symbolic links are followed, because the Hugging
    Face cache consists of them.
    """
    if not isinstance(file, str) or len(file) > 255 or not file.endswith(suffix):
        return False
    return file.isprintable() and not set(file) & set("/\\:")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        CheckpointError: if the file is missing or does not hold a JSON object.
    """
    try:
        return strict_json.read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _json_object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        return strict_json.parse_object(text, where)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
