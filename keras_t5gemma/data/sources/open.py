"""`text_source`: files, Hugging Face datasets and Python iterables as Grain datasets."""

import glob
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import grain

from keras_t5gemma.checks import integer
from keras_t5gemma.data.sources.parquet import ParquetRows
from keras_t5gemma.data.sources.rows import RowIterator, RowStream, optional_module, text_of
from keras_t5gemma.data.sources.text_files import SAMPLE_BY, TextFiles, format_suffix
from keras_t5gemma.suggestions import check_choice

_Dataset = TypeVar("_Dataset", bound=grain.MapDataset)

# Suffix of a file's name, without ".gz" or ".zst" -> its format.
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}


def text_source(
    data: object,
    *,
    field: str | None = "text",
    format: str | None = None,
    sample_by: str = "line",
    decode: Callable[[bytes], object] = bytes.decode,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.MapDataset | grain.IterDataset:
    """Opens texts as a Grain dataset, for `pretraining_dataset` and `supervised_dataset`. They are read when needed.

    | data                                        | dataset             | shuffled                         |
    | ------------------------------------------- | ------------------- | -------------------------------- |
    | text, JSONL: plain, `.gz`, `.zst`           | `grain.IterDataset` | within a buffer                  |
    | Parquet                                     | `grain.MapDataset`  | row groups, and the rows of each |
    | ArrayRecord                                 | `grain.MapDataset`  | globally                         |
    | `datasets.Dataset`, any sequence            | `grain.MapDataset`  | globally                         |
    | `datasets.IterableDataset`                  | `grain.IterDataset` | within a buffer                  |
    | an iterable, or a function that returns one | `grain.IterDataset` | within a buffer                  |

    A row may be a string, or have fields, of which `field` is the text. For every source, the iterators of datasets
    built on it save and restore their position. For an iterable this means to go through it again up to the position.

    >>> data = text_source("corpus/*.jsonl.zst", field="content", shard_index=process, shard_count=processes)

    Args:
        data: a path or a pattern such as "data/*.txt", or a list of them, all of one format; or another source of the
            table above.
        field: the field or column that holds the text; `None` for whole rows, which `supervised_dataset` takes.
        format: "text", "jsonl", "parquet" or "array_record"; `None` to infer it from the files' names.
        sample_by: the unit of a text file that is one document: a "line", a "paragraph" (up to a blank line), or
            "document" for the whole file, which is then read at once.
        decode: a function of an ArrayRecord's bytes that returns the row. The default decodes UTF-8 text; another
            example is `json.loads`.
        shard_index: index of the share to read, from 0. In training with several processes, the process's index.
        shard_count: number of shares. Files are shared if there are enough of them, otherwise rows.

    Returns:
        A `grain.MapDataset` or `grain.IterDataset` of strings, or of rows if `field` is `None`.

    Raises:
        ValueError: if an argument is out of range, no file is found, or a file is not of its format. Faults inside a
            file (bytes that are not UTF-8, a line without the field) are raised when they are read; the message names
            file and line.
        ImportError: if a library that the format needs is not installed.
    """
    shard_count = integer(shard_count, "shard_count")
    shard_index = integer(shard_index, "shard_index", least=0)
    if shard_index >= shard_count:
        raise ValueError(f"`shard_index` must be below shard_count={shard_count}. Received: {shard_index}.")
    check_choice(sample_by, "sample_by", SAMPLE_BY)
    shard = {"shard_index": shard_index, "shard_count": shard_count}
    if _are_paths(data):
        paths = _paths(data)
        format = _format(paths, format)
        if format in ("text", "jsonl"):
            if len(paths) >= shard_count:
                paths, shard = paths[shard_index::shard_count], {"shard_index": 0, "shard_count": 1}
            return TextFiles(paths, is_json=format == "jsonl", field=field, sample_by=sample_by, **shard)
        if format == "parquet":
            return _not_empty(ParquetRows(paths, field, **shard), paths)
        rows: Any = _ArrayRecords(paths, decode)
    elif isinstance(data, (grain.MapDataset, grain.IterDataset)):
        raise ValueError("`data` is a Grain dataset already: it needs no `text_source`.")
    else:
        rows = data
    if hasattr(rows, "state_dict") and hasattr(rows, "load_state_dict"):
        if shard_count > 1:
            split = optional_module("datasets.distributed", "Sharing a `datasets.IterableDataset`")
            rows = split.split_dataset_by_node(rows, rank=shard_index, world_size=shard_count)
        return _HuggingFaceStream(rows, field)
    if hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and not isinstance(rows, Mapping):
        texts = grain.MapDataset.source(_TextsOfRows(rows, field))
        return _not_empty(texts, "`data`")[shard_index::shard_count]
    if isinstance(rows, Mapping) or not (isinstance(rows, Iterable) or callable(rows)):
        raise ValueError(
            f"`data` must be paths, a dataset, a sequence, an iterable or a function. Received: {rows!r:.80}."
        )
    if not callable(rows) and iter(rows) is rows:
        raise ValueError(
            "`data` can be iterated only once, but epochs and a saved position start it again. Pass a function that "
            "returns an iterator, e.g. the generator function itself, without calling it."
        )
    return _IterableRows(rows, field, **shard)


class _TextsOfRows:
    """The texts of rows with random access."""

    def __init__(self, rows: Sequence, field: str | None):
        self.rows, self.field = rows, field

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> object:
        return text_of(self.rows[index], self.field, f"Row {index}")


class _ArrayRecords:
    """The decoded records of ArrayRecord files, with random access."""

    def __init__(self, paths: list[Path], decode: Callable[[bytes], object]):
        self.paths, self.decode = paths, decode
        self.source: Any = grain.sources.ArrayRecordDataSource([str(path) for path in paths])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> object:
        try:
            return self.decode(self.source[index])
        except ValueError as error:
            names = ", ".join(map(str, self.paths))
            raise ValueError(f"Record {index} of {names} cannot be decoded: {error}") from error


class _IterableRows(RowStream):
    """Rows of an iterable, or of a function that returns one. A position is the number of rows before it."""

    def __init__(self, data: Iterable | Callable, field: str | None, **shard: int):
        super().__init__(**shard)
        self.data, self.field = data, field

    def __iter__(self) -> grain.DatasetIterator:
        return _IterableIterator(self)


class _IterableIterator(RowIterator):
    def __init__(self, rows: _IterableRows):
        super().__init__(rows)
        self._data, self._field = rows.data, rows.field
        self._iterator: Iterator | None = None

    def next_row(self) -> Callable[[], object]:
        if self._iterator is None:
            self._iterator = iter(self._data() if callable(self._data) else self._data)
            # Skips the rows before a restored position.
            next(itertools.islice(self._iterator, self.number, self.number), None)
        return partial(text_of, next(self._iterator), self._field, f"Row {self.number}")

    def get_position(self) -> dict:
        return {}

    def set_position(self, state: dict) -> None:  # noqa: ARG002 the row's number suffices, and is restored already
        self._iterator = None


class _HuggingFaceStream(RowStream):
    """Rows of a `datasets.IterableDataset`, which saves its position itself. It is one process's share already."""

    def __init__(self, data: Any, field: str | None):
        super().__init__()
        self.data, self.field = data, field

    def __iter__(self) -> grain.DatasetIterator:
        return _HuggingFaceIterator(self)


class _HuggingFaceIterator(RowIterator):
    def __init__(self, rows: _HuggingFaceStream):
        super().__init__(rows)
        self._field = rows.field
        # In `datasets` the position belongs to the dataset, not to its iterator. So this iterator has a dataset.
        self._data = rows.data.skip(0)
        self._start = self._data.state_dict()
        self._iterator: Any = None

    def next_row(self) -> Callable[[], object]:
        if self._iterator is None:
            self._iterator = iter(self._data)
        return partial(text_of, next(self._iterator), self._field, f"Row {self.number}")

    def get_position(self) -> dict:
        return {"rows": self._start if self._iterator is None else self._data.state_dict()}

    def set_position(self, state: dict) -> None:
        self._start = state["rows"]
        self._data.load_state_dict(self._start)
        self._iterator = None


_Path = str | Path


def _are_paths(data: object) -> TypeGuard[_Path | Sequence[_Path]]:
    """Whether the argument of `text_source` is a path or a list of paths."""
    return isinstance(data, _Path) or (
        isinstance(data, (list, tuple)) and bool(data) and all(isinstance(path, _Path) for path in data)
    )


def _paths(data: _Path | Sequence[_Path]) -> list[Path]:
    """The files that match names and patterns, in order."""
    paths = []
    for name in [data] if isinstance(data, _Path) else data:
        matches = [name] if Path(name).exists() else sorted(glob.glob(str(name), recursive=True))
        if not matches:
            raise ValueError(
                f"There is no file {str(name)!r:.200}, and no file matches it as a pattern. Texts themselves need no "
                f"`text_source`: pass the list of texts to the dataset."
            )
        paths += [Path(path) for path in matches]
    if folders := [path for path in paths if path.is_dir()]:
        raise ValueError(
            f"`data` names a folder, {folders[0]}: name the files in it, such as {folders[0] / '*.jsonl'}."
        )
    return paths


def _format(paths: list[Path], format: str | None) -> str:
    """The format of all files, inferred from their names if it is None."""
    if format is not None:
        check_choice(format, "format", sorted(set(FORMATS.values())))
        return format
    formats = {FORMATS.get(format_suffix(path), ""): path for path in paths}
    if "" in formats:
        raise ValueError(
            f"The name of {formats['']} does not tell its format (known: {', '.join(FORMATS)}, the text formats with "
            f".gz or .zst behind). Pass `format`."
        )
    if len(formats) > 1:
        raise ValueError(
            f"Files must be of one format. Received: {' and '.join(map(str, formats.values()))}. Mix sources with "
            f"`grain.MapDataset.mix` or `grain.IterDataset.mix`."
        )
    return next(iter(formats))


def _not_empty(dataset: _Dataset, name: object) -> _Dataset:
    if not len(dataset):
        raise ValueError(f"{name} has no rows.")
    return dataset
