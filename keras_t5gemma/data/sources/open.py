"""Where texts come from: files, Hugging Face datasets and Python iterables, as Grain datasets."""

import glob
import itertools
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import grain

from keras_t5gemma.checks import integer
from keras_t5gemma.data.sources.parquet import ParquetRows
from keras_t5gemma.data.sources.rows import RowIterator, RowStream, optional_module, text_of
from keras_t5gemma.data.sources.text_files import SAMPLE_BY, TextFiles, format_suffix
from keras_t5gemma.suggestions import check_choice

# The end of a file's name, before ".gz" or ".zst" -> its format.
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
    data,
    *,
    field="text",
    format=None,
    sample_by="line",
    decode=bytes.decode,
    shard_index=0,
    shard_count=1,
):
    """Texts as a Grain dataset, for `pretraining_dataset` and `supervised_dataset`; read as they are needed.

    | data                                      | is                  | shuffled                         |
    | ----------------------------------------- | ------------------- | -------------------------------- |
    | text, JSONL: plain, `.gz`, `.zst`         | `grain.IterDataset` | within a buffer                  |
    | Parquet                                   | `grain.MapDataset`  | row groups, and the rows of each |
    | ArrayRecord                               | `grain.MapDataset`  | as a whole                       |
    | `datasets.Dataset`, any sequence          | `grain.MapDataset`  | as a whole                       |
    | `datasets.IterableDataset`                | `grain.IterDataset` | within a buffer                  |
    | an iterable, or a function that makes one | `grain.IterDataset` | within a buffer                  |

    A row that is a string is a text; of one with fields the text is `field`. Whatever the source, the iterators of what
    is built on it save and restore their position; an iterable is gone through again up to it.

    >>> data = text_source("corpus/*.jsonl.zst", field="content", shard_index=process, shard_count=processes)

    Args:
        data: a path or a pattern such as "data/*.txt", or a list of them, all of one format; or another source.
        field: the field or column that holds the text; `None` for whole rows, which `supervised_dataset` takes.
        format: "text", "jsonl", "parquet" or "array_record"; `None` to go by the files' names.
        sample_by: what is a document of a text file: a "line", a "paragraph" (up to a blank line) or all of it, the
            "document", which is then read at once.
        decode: called with an ArrayRecord's bytes, gives the row; UTF-8 text by default, `json.loads` for another.
        shard_index: which of the shares this is, from 0: in training on several processes, the process.
        shard_count: how many shares there are. Files are shared where there are enough of them, rows otherwise.

    Returns:
        A `grain.MapDataset` or `grain.IterDataset` of strings, or of rows where `field` is `None`.

    Raises:
        ValueError: if an argument is out of range, no file is found, or a file is not of its format. What is only
            seen when it is read (bytes that are not UTF-8, a line without the field) is raised then, and names file and
            line.
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
        data = _ArrayRecords(paths, decode)
    elif isinstance(data, (grain.MapDataset, grain.IterDataset)):
        raise ValueError("`data` is a Grain dataset already: it needs no `text_source`.")
    if hasattr(data, "state_dict") and hasattr(data, "load_state_dict"):
        if shard_count > 1:
            split = optional_module("datasets.distributed", "Sharing a `datasets.IterableDataset`")
            data = split.split_dataset_by_node(data, rank=shard_index, world_size=shard_count)
        return _HuggingFaceStream(data, field)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping):
        rows = grain.MapDataset.source(_Rows(data, field))
        return _not_empty(rows, "`data`")[shard_index::shard_count]
    if isinstance(data, Mapping) or not (isinstance(data, Iterable) or callable(data)):
        raise ValueError(
            f"`data` must be paths, a dataset, a sequence, an iterable or a function. Received: {data!r:.80}."
        )
    if not callable(data) and iter(data) is data:
        raise ValueError(
            "`data` can be gone through once only, but epochs and a saved position start it anew. Pass a function that "
            "makes the iterator, e.g. the generator function itself, without calling it."
        )
    return _IterableRows(data, field, **shard)


class _Rows:
    """The texts of anything with random access."""

    def __init__(self, rows, field):
        self.rows, self.field = rows, field

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return text_of(self.rows[index], self.field, f"Row {index}")


class _ArrayRecords:
    def __init__(self, paths, decode):
        self.paths, self.decode = paths, decode
        self.source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            return self.decode(self.source[index])
        except ValueError as error:
            names = ", ".join(map(str, self.paths))
            raise ValueError(f"Record {index} of {names} cannot be decoded: {error}") from error


class _IterableRows(RowStream):
    """Rows of an iterable, or of what a function makes; a position is their number."""

    def __init__(self, data, field, **shard):
        super().__init__(**shard)
        self.data, self.field = data, field

    def __iter__(self):
        return _IterableIterator(self)


class _IterableIterator(RowIterator):
    def __init__(self, rows):
        super().__init__(rows)
        self._iterator = None

    def next_row(self):
        if self._iterator is None:
            data = self.rows.data
            self._iterator = iter(data() if callable(data) else data)
            # Those before a restored position.
            next(itertools.islice(self._iterator, self.number, self.number), None)
        return partial(text_of, next(self._iterator), self.rows.field, f"Row {self.number}")

    def get_position(self):
        return {}

    def set_position(self, state):  # noqa: ARG002 the number, which is kept already, is all
        self._iterator = None


class _HuggingFaceStream(RowStream):
    """Rows of a `datasets.IterableDataset`, which keeps its position itself; it is shared out before."""

    def __init__(self, data, field):
        super().__init__()
        self.data, self.field = data, field

    def __iter__(self):
        return _HuggingFaceIterator(self)


class _HuggingFaceIterator(RowIterator):
    def __init__(self, rows):
        super().__init__(rows)
        # The position belongs to the dataset there, not to its iterator: this one has its own.
        self._data = rows.data.skip(0)
        self._start = self._data.state_dict()
        self._iterator = None

    def next_row(self):
        if self._iterator is None:
            self._iterator = iter(self._data)
        return partial(text_of, next(self._iterator), self.rows.field, f"Row {self.number}")

    def get_position(self):
        return {"rows": self._start if self._iterator is None else self._data.state_dict()}

    def set_position(self, state):
        self._start = state["rows"]
        self._data.load_state_dict(self._start)
        self._iterator = None


def _are_paths(data):
    one = (str, Path)
    return isinstance(data, one) or (
        isinstance(data, (list, tuple)) and bool(data) and all(isinstance(path, one) for path in data)
    )


def _paths(data):
    """The files that names and patterns stand for, in order."""
    paths = []
    for name in [data] if isinstance(data, (str, Path)) else data:
        found = [name] if Path(name).exists() else sorted(glob.glob(str(name), recursive=True))
        if not found:
            raise ValueError(
                f"No file {str(name)!r:.200}, and none that it describes as a pattern. Texts themselves need no "
                f"`text_source`: pass the list of them on."
            )
        paths += [Path(path) for path in found]
    if folders := [path for path in paths if path.is_dir()]:
        raise ValueError(
            f"`data` names a folder, {folders[0]}: name the files in it, such as {folders[0] / '*.jsonl'}."
        )
    return paths


def _format(paths, format):
    """The one format of all files, by their names if it is not given."""
    if format is not None:
        check_choice(format, "format", sorted(set(FORMATS.values())))
        return format
    formats = {FORMATS.get(format_suffix(path)): path for path in paths}
    if None in formats:
        raise ValueError(
            f"The name of {formats[None]} does not tell its format (known: {', '.join(FORMATS)}, the text formats with "
            f".gz or .zst behind). Pass `format`."
        )
    if len(formats) > 1:
        raise ValueError(
            f"Files must be of one format. Received: {' and '.join(map(str, formats.values()))}. Mix sources with "
            f"`grain.MapDataset.mix` or `grain.IterDataset.mix`."
        )
    return next(iter(formats))


def _not_empty(dataset, what):
    if not len(dataset):
        raise ValueError(f"{what} has no rows.")
    return dataset
