"""Text and JSONL files, plain or compressed, a document at a time."""

import gzip
import io
import json
import zlib
from functools import partial
from pathlib import Path

from keras_t5gemma.data.sources.rows import RowIterator, RowStream, optional_module, text_of

SAMPLE_BY = ("line", "paragraph", "document")
# What the end of a name says; a compression's stands after the format's.
COMPRESSIONS = (".gz", ".zst")
# Read at once where a position is looked for in a file that can only be read from its start.
_SKIP_BYTES = 1 << 20
# Looked at for a NUL byte, as git and grep do, before a line of a binary file is read, which may be all of it.
_BINARY_CHECK_BYTES = 8_000


class TextFiles(RowStream):
    """Documents of text or JSONL files, one file after the other; no more than a document is in memory.

    Blank lines are not documents. A position is the file, and the byte in it once decompressed: a plain file goes on
    there, a compressed one is read up to it.
    """

    def __init__(self, paths, *, is_json, field, sample_by, shard_index, shard_count):
        super().__init__(shard_index, shard_count)
        self.paths, self.is_json, self.field, self.sample_by = paths, is_json, field, sample_by

    def __iter__(self):
        return _FilesIterator(self)


class _FilesIterator(RowIterator):
    def __init__(self, rows):
        super().__init__(rows)
        self._position = {"file": 0, "offset": 0, "line": 0}
        self._documents = None

    def next_row(self):
        """The next document, of the next file if one ends."""
        paths = self.rows.paths
        while self._position["file"] < len(paths):
            path = paths[self._position["file"]]
            if self._documents is None:
                sample_by = "line" if self.rows.is_json else self.rows.sample_by
                self._documents = _documents(path, sample_by, self._position["offset"], self._position["line"])
            document = next(self._documents, None)
            if document is not None:
                line, content, offset, next_line = document
                self._position |= {"offset": offset, "line": next_line}
                return partial(self._row, content, f"{path}, line {line}")
            self._documents = None
            self._position = {"file": self._position["file"] + 1, "offset": 0, "line": 0}
        if not self.number:
            raise ValueError(f"{', '.join(map(str, paths))}: no document in it, only blank lines or nothing.")
        raise StopIteration

    def get_position(self):
        return dict(self._position)

    def set_position(self, state):
        self._position = {name: state[name] for name in ("file", "offset", "line")}
        self._documents = None

    def _row(self, content, place):
        """A document from its bytes: a line, or a whole file."""
        text = _decode(content, place)
        if not self.rows.is_json:
            return text
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON ({error}). Received: {text:.80}") from error
        return text_of(row, self.rows.field, place)


def open_bytes(path):
    """A file's bytes, decompressed by its name, as a buffered stream.

    Raises:
        ImportError: if the library for it is not installed.
    """
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        zstandard = optional_module("zstandard", f"Reading {path}")
        # Files that were concatenated or written in parallel have several frames.
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(reader)
    return path.open("rb")


def format_suffix(path):
    """The part of a name that says its format: ".jsonl" of "a.jsonl.gz"."""
    path = Path(path)
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _documents(path, sample_by, offset, line):
    """`(first line's number, bytes, next byte, lines before it)` of each document from a byte of a file on."""
    try:
        with open_bytes(path) as file:
            if b"\0" in file.peek(_BINARY_CHECK_BYTES)[:_BINARY_CHECK_BYTES]:
                raise ValueError(f"{path} is binary: there is a NUL byte at its start. Text must be UTF-8.")
            _skip(file, offset, path)
            if sample_by == "document":
                content = file.read()
                if content.strip():
                    yield line + 1, content, offset + len(content), line
                return
            lines, first = [], line + 1
            for content in file:
                offset, line = offset + len(content), line + 1
                if content.strip():
                    first = first if lines else line
                    lines.append(content)
                if lines and (sample_by == "line" or not content.strip()):
                    yield first, b"".join(lines), offset, line
                    lines = []
            if lines:
                yield first, b"".join(lines), offset, line
    # zstandard has an exception of its own, which cannot be named where it is not installed.
    except (EOFError, OSError, zlib.error, *_zstd_errors(path)) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read after line {line}: {type(error).__name__}: {error}") from error


def _skip(file, offset, path):
    if path.suffix not in COMPRESSIONS:
        file.seek(offset)
        return
    while offset:
        offset -= len(file.read(min(offset, _SKIP_BYTES)))


def _zstd_errors(path):
    return (optional_module("zstandard", f"Reading {path}").ZstdError,) if path.suffix == ".zst" else ()


def _decode(content, place):
    """Bytes as text; an error names the file and the place."""
    if b"\0" in content:
        raise ValueError(f"{place} holds a NUL byte: the file is binary or not UTF-8.")
    try:
        # A byte order mark is not part of the text.
        return content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        number = place.rpartition(" ")[2]
        # In a document of several lines the fault may be further down.
        place = place.removesuffix(number) + str(int(number) + content[: error.start].count(b"\n"))
        raise ValueError(
            f"{place} is not UTF-8: byte {content[error.start]:#04x}, {error.reason}. Convert the file first."
        ) from error
