"""Text and JSONL files, plain or compressed, one document in memory at a time."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from keras_t5gemma.data.sources.rows import RowIterator, RowStream, optional_module, text_of

SAMPLE_BY = ("line", "paragraph", "document")
# Suffixes of compressed files. They come after the format's suffix.
COMPRESSIONS = (".gz", ".zst")
# Bytes per read on the way to a position in a compressed file, which can only be read from its start.
_SKIP_BYTES = 1 << 20
# Bytes searched for a NUL byte, as git and grep do, before the first line is read: a line of a binary file may be the
# whole file.
_BINARY_CHECK_BYTES = 8_000


class TextFiles(RowStream):
    """Documents of text or JSONL files, one file after the other, with one document in memory at a time.

    Blank lines are not documents. A position is a file and a byte offset in its decompressed content. A plain file
    continues there at once; a compressed one is read up to the offset.

    Args:
        paths: the files.
        is_json: whether they are JSONL.
        field: the JSONL field that holds the text; `None` for whole rows.
        sample_by: one of `SAMPLE_BY`, for text files.
        shard_index: index of the share to read.
        shard_count: number of shares.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        is_json: bool,
        field: str | None,
        sample_by: str,
        shard_index: int,
        shard_count: int,
    ):
        super().__init__(shard_index, shard_count)
        self.paths, self.is_json, self.field, self.sample_by = paths, is_json, field, sample_by

    def __iter__(self) -> "_FilesIterator":
        return _FilesIterator(self)


class _FilesIterator(RowIterator):
    def __init__(self, rows: TextFiles):
        super().__init__(rows)
        self._files = rows
        self._position = {"file": 0, "offset": 0, "line": 0}
        self._documents: Iterator[tuple[int, bytes, int, int]] | None = None

    def next_row(self) -> Callable[[], Any]:
        """Reads the next document, from the next file at the end of one."""
        paths = self._files.paths
        while self._position["file"] < len(paths):
            path = paths[self._position["file"]]
            if self._documents is None:
                sample_by = "line" if self._files.is_json else self._files.sample_by
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

    def get_position(self) -> dict:
        return dict(self._position)

    def set_position(self, state: dict) -> None:
        self._position = {name: state[name] for name in ("file", "offset", "line")}
        self._documents = None

    def _row(self, content: bytes, place: str) -> Any:
        """Parses the bytes of a document: to a text, or of JSONL to a text or a row."""
        text = _decode(content, place)
        if not self._files.is_json:
            return text
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON ({error}). Received: {text:.80}") from error
        return text_of(row, self._files.field, place)


def open_bytes(path: Path) -> io.BufferedReader:
    """Opens a file as a buffered stream of bytes, which is decompressed if the file's name says so.

    Raises:
        ImportError: if the library that decompresses it is not installed.
    """
    if path.suffix == ".gz":
        return cast(io.BufferedReader, gzip.open(path, "rb"))  # it has the same methods
    if path.suffix == ".zst":
        zstandard = optional_module("zstandard", f"Reading {path}")
        # Files that are concatenated or written in parallel have several frames.
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(reader)
    return path.open("rb")


def format_suffix(path: str | Path) -> str:
    """The suffix of a name that says its format: ".jsonl" of "a.jsonl.gz"."""
    path = Path(path)
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _documents(path: Path, sample_by: str, offset: int, line: int) -> Iterator[tuple[int, bytes, int, int]]:
    """Reads the documents of a file from an offset on.

    Args:
        path: the file.
        sample_by: one of `SAMPLE_BY`.
        offset: bytes to skip, of the decompressed content.
        line: number of lines in these bytes.

    Yields:
        `(number, content, offset, line)`: the number of the document's first line, its bytes, and the offset and the
        number of lines after it.

    Raises:
        ValueError: if the file is binary or cannot be read.
    """
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
    # zstandard has its own exception, which cannot be named if the library is not installed.
    except (EOFError, OSError, zlib.error, *_zstd_errors(path)) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read after line {line}: {type(error).__name__}: {error}") from error


def _skip(file: io.BufferedReader, offset: int, path: Path) -> None:
    if path.suffix not in COMPRESSIONS:
        file.seek(offset)
        return
    while offset:
        offset -= len(file.read(min(offset, _SKIP_BYTES)))


def _zstd_errors(path: Path) -> tuple:
    return (optional_module("zstandard", f"Reading {path}").ZstdError,) if path.suffix == ".zst" else ()


def _decode(content: bytes, place: str) -> str:
    """Decodes bytes as UTF-8 text. An error names the file and the line."""
    if b"\0" in content:
        raise ValueError(f"{place} holds a NUL byte: the file is binary or not UTF-8.")
    try:
        # A byte order mark is not part of the text.
        return content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        number = place.rpartition(" ")[2]
        # In a document of several lines, the fault may be in a later line than the first.
        place = place.removesuffix(number) + str(int(number) + content[: error.start].count(b"\n"))
        raise ValueError(
            f"{place} is not UTF-8: byte {content[error.start]:#04x}, {error.reason}. Convert the file first."
        ) from error
