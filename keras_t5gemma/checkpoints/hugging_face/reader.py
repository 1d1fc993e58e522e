"""A Hugging Face folder as a lazy `TensorSource`, read strictly and one tensor at a time.

safetensors only: nothing is ever unpickled. The format (https://huggingface.co/docs/safetensors): 8 bytes, little
endian, the header's length; the header, a JSON object {name: {dtype, shape, data_offsets}} and, optionally,
`__metadata__`; then the data, with no holes. This module parses it itself, so that every fault becomes one
`CheckpointError` that names the file and the tensor, and so that no tensor but the one asked for is ever mapped.
"""

import json
import math
from pathlib import Path

import numpy as np

from keras_t5gemma.checkpoints.tensor_source import CHUNK_BYTES, DTYPES, CheckpointError, TensorSource, checksum

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The format's own limit on a header; it also keeps a corrupt length, or a file that is no JSON, from filling memory.
MAX_HEADER_BYTES = 100_000_000
# Digits of an integer: 64 bits, more than any size. Of longer ones neither products nor messages could be made.
_MAX_DIGITS = 20
# In the header's `__metadata__`, as JSON text {name: 16 hexadecimal digits}: what `tensors.checksum` gives.
CHECKSUMS_KEY = "xxh3_64"


class CheckpointFolder(TensorSource):
    """The tensors of a Hugging Face folder, in one safetensors file or in shards with an index.

    Opening reads the headers only. As `transformers` does, `model.safetensors` is read where both forms are there.

    Args:
        folder: a path.

    Raises:
        CheckpointError: where there are no weights in safetensors, a shard is missing or damaged, the index names a
            file outside the folder, or index and shards disagree about which tensors they hold.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if (self.folder / WEIGHTS_FILE).is_file():
            file = SafetensorsFile(self.folder / WEIGHTS_FILE)
            self._files = dict.fromkeys(file.tensors, file)
        elif (self.folder / INDEX_FILE).is_file():
            self._files = self._open_shards()
        else:
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            raise CheckpointError(
                f"{self.folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}."
                + (f" {', '.join(pickled)} would have to be unpickled, which is never done." if pickled else "")
            )

    @property
    def config(self):
        """The folder's `config.json`, parsed."""
        return read_json(self.folder / "config.json")

    def names(self):
        """The tensors' names, in the order of the file or of the index."""
        return list(self._files)

    def shape(self, name):
        """The shape of one tensor, from the header."""
        return self._file(name).tensors[name].shape

    def dtype(self, name):
        """The numpy dtype of one tensor, from the header; one that is no dtype of weights is an error."""
        return self._file(name).dtype(name)

    def read(self, name):
        """One tensor as a numpy array of its own, read now."""
        return self._file(name).read(name)

    def chunks(self, name):
        """One tensor in flat pieces, read as they are asked for."""
        return self._file(name).chunks(name)

    def has_checksum(self, name):
        """Whether the file tells the tensor's checksum, so that reading it notices a single flipped bit."""
        return name in self._file(name).checksums

    def where(self, name=None):
        """The path of the file that holds the tensor; without a name, of the folder."""
        return str(self.folder if name is None else self._file(name).path)

    def _file(self, name):
        if name not in self._files:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}.")
        return self._files[name]

    def _open_shards(self):
        index = self.folder / INDEX_FILE
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no `weight_map` from tensor names to files.")
        shards = {}
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

    def __init__(self, format_dtype, shape, begin, end):
        self.format_dtype, self.shape, self.begin, self.end = format_dtype, shape, begin, end


class SafetensorsFile:
    """One safetensors file: the header checked in full when opened, the data read a tensor at a time.

    Args:
        path: of the file.

    Raises:
        CheckpointError: where the file is missing, truncated, longer than its header says, or the header is not one.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            if self.path.exists() and not self.path.is_file():
                # A pipe would be waited for, and a device has no end.
                raise CheckpointError(f"{self.path} cannot be read: it is no file.")
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                    raise CheckpointError(
                        f"{self.path} is truncated or no safetensors file: {size} bytes, of which the first 8 announce "
                        f"a header of {length}."
                    )
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        header = _json_object(text, f"The header of {self.path}")
        metadata = header.pop("__metadata__", None) or {}
        self.tensors = self._parse(header, 8 + length, size)
        self.checksums = self._parse_checksums(metadata)

    def dtype(self, name):
        """The numpy dtype of one tensor."""
        found = self.tensors[name].format_dtype
        if found not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {found:.80}. Expected one of {list(DTYPES)}."
            )
        return DTYPES[found]

    def read(self, name):
        """One tensor as a numpy array of its own."""
        entry, dtype = self.tensors[name], self.dtype(name)
        array = np.empty(math.prod(entry.shape), dtype)
        flat, step = array.view("uint8"), CHUNK_BYTES
        for _ in self._fill(name, (flat[start : start + step] for start in range(0, flat.size, step))):
            pass
        return array.reshape(entry.shape)

    def chunks(self, name):
        """One tensor in flat pieces, read as they are asked for."""
        entry, dtype = self.tensors[name], self.dtype(name)
        buffer, left = np.empty(CHUNK_BYTES, "uint8"), entry.end - entry.begin
        sizes = [min(CHUNK_BYTES, left - start) for start in range(0, left, CHUNK_BYTES)]
        for piece in self._fill(name, (buffer[:size] for size in sizes)):
            yield piece.view(dtype)

    def _fill(self, name, pieces):
        """Reads a tensor's bytes into byte arrays, one after the other, and compares the checksum after the last."""
        entry = self.tensors[name]
        found = checksum(name, self.dtype(name), entry.shape) if name in self.checksums else None
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.begin)
                for piece in pieces:
                    if _read_into(file, piece) < piece.size:
                        raise CheckpointError(f"{self.path}: tensor {name!r} ends early: the file is truncated.")
                    if found is not None:
                        found.update(piece)
                    yield piece
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error.strerror or error}.") from error
        if found is not None and self.checksums[name] != found.hexdigest():
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has the checksum {found.hexdigest()}, where the file says "
                f"{self.checksums[name]!r:.80}: its data or its description were changed."
            )

    def _parse_checksums(self, metadata):
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

    def _parse(self, header, data_begin, size):
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
                f"{self.path} has {size} bytes where its header describes {position}"
                + (f": truncated within or before tensor {last!r}." if size < position else ".")
            )
        return tensors

    def _entry(self, name, value, data_begin):
        try:
            format_dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
            numbers = [*shape, begin, end]
            valid = isinstance(format_dtype, str) and all(type(n) is int and n >= 0 for n in numbers) and begin <= end
        except (TypeError, KeyError, ValueError):
            valid = False
        if not valid:
            raise CheckpointError(
                f"{self.path}: the header's entry for tensor {name!r} is {value!r:.200}. Expected dtype, shape and "
                f"data_offsets."
            )
        if format_dtype in DTYPES and math.prod(shape) * DTYPES[format_dtype].itemsize != end - begin:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has {end - begin} bytes, which do not make {format_dtype} of "
                f"shape {shape!r:.200}."
            )
        return Entry(format_dtype, tuple(shape), data_begin + begin, data_begin + end)


def _read_into(file, piece):
    """Fills a byte array from an unbuffered file, which may give less than was asked for; returns how much came."""
    view, filled = memoryview(piece), 0
    while filled < len(view) and (count := file.readinto(view[filled:])):
        filled += count
    return filled


def is_plain_name(file, suffix):
    """Whether what an index names is a file in its own folder.

    A path could leave the folder; no program writes one there. Symbolic links are followed, because the Hugging Face
    cache is made of them.
    """
    if not isinstance(file, str) or len(file) > 255 or not file.endswith(suffix):
        return False
    return file.isprintable() and not set(file) & set("/\\:")


def read_json(path):
    """The JSON object in a file, as a dict.

    Raises:
        CheckpointError: where the file is missing or holds anything else.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} has {size} bytes. Expected JSON of at most {MAX_HEADER_BYTES}.")
            file.seek(0)
            text = file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    return _json_object(text, str(path))


def _json_object(text, where):
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error!s:.400}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}. Expected an object.")
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
