"""Parquet files: random access to rows, one row group in memory at a time."""

import bisect
import collections
import copy
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain

from keras_t5gemma.data.pipelines.streams import ORDER, generator
from keras_t5gemma.data.sources.rows import optional_module, text_of

# Row groups in memory per process: the one in use, and its neighbor while threads read ahead.
_GROUPS_IN_MEMORY = 2


class ParquetRows(grain.MapDataset):
    """Rows of Parquet files. Random access is cheap if neighboring rows are read together.

    A row group is the smallest unit that can be read. So `shuffle` shuffles the groups and the rows within each group,
    differently in each epoch, and never reads a group twice for it. Shuffle before `map`: a dataset after `map` is
    shuffled row by row, which reads a group for each row.

    Processes share the row groups, or the rows of each group if there are fewer groups than processes.

    Args:
        paths: the files.
        field: the column that holds the text; `None` for whole rows.
        shard_index: index of the share to read.
        shard_count: number of shares.

    Raises:
        ValueError: if a file is not a Parquet file, or lacks the column.
        ImportError: if pyarrow is not installed.
    """

    def __init__(self, paths: Sequence[Path], field: str | None, shard_index: int = 0, shard_count: int = 1):
        super().__init__()
        self.field = field
        parquet = optional_module("pyarrow.parquet", f"Reading {paths[0]}")
        groups = []
        for path in paths:
            try:
                metadata = parquet.read_metadata(path)
            except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
                raise ValueError(f"{path} is not a Parquet file: {error}") from error
            names = metadata.schema.to_arrow_schema().names
            if field is not None and field not in names:
                raise ValueError(f"{path} has no column {field!r}. It has: {', '.join(names)}.")
            groups += [(path, i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)]
        if len(groups) >= shard_count:
            groups, shard_index, shard_count = groups[shard_index::shard_count], 0, 1
        self.groups = [(path, i, range(shard_index, rows, shard_count)) for path, i, rows in groups]
        self.length = sum(len(rows) for _, _, rows in self.groups)
        self.shuffle_seed: int | None = None
        self._reset_caches()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, index = divmod(index, self.length)
        order, ends = self._order(epoch)
        position = bisect.bisect_right(ends, index)
        group, row = order[position], index - (ends[position - 1] if position else 0)
        texts = self._texts(epoch, group)
        return texts[row]

    def shuffle(self, seed: int | None = None) -> "ParquetRows":
        """A copy with shuffled groups and shuffled rows within each group, differently in each epoch."""
        shuffled = copy.copy(self)
        shuffled.shuffle_seed = 0 if seed is None else seed
        shuffled._reset_caches()
        return shuffled

    def __getstate__(self) -> dict:
        # Locks and caches cannot be pickled or need not be: each worker has its own.
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_cache", "_orders")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._reset_caches()

    def _reset_caches(self) -> None:
        self._lock, self._cache, self._orders = threading.Lock(), collections.OrderedDict(), {}

    def _order(self, epoch: int) -> tuple[Sequence[int], list[int]]:
        """The order of the groups in an epoch, and for each group the index after its last row."""
        cached = self._orders.get(epoch)
        if cached is None:
            count, seed = len(self.groups), self.shuffle_seed
            order = range(count) if seed is None else generator(seed, ORDER, epoch).permutation(count).tolist()
            cached = order, list(itertools.accumulate(len(self.groups[i][2]) for i in order))
            self._orders = {epoch: cached}
        return cached

    def _texts(self, epoch: int, group: int) -> list:
        """The texts of a row group in the order of an epoch, from the cache or from the file."""
        with self._lock:
            if (epoch, group) not in self._cache:
                while len(self._cache) >= _GROUPS_IN_MEMORY:
                    self._cache.popitem(last=False)
                self._cache[epoch, group] = self._read(epoch, group)
            self._cache.move_to_end((epoch, group))
            return self._cache[epoch, group]

    def _read(self, epoch: int, group: int) -> list:
        """Reads the texts of a row group, in the order of an epoch."""
        path, number, rows = self.groups[group]
        parquet = optional_module("pyarrow.parquet", f"Reading {path}")
        with parquet.ParquetFile(path) as file:
            table = file.read_row_group(number, columns=None if self.field is None else [self.field])
        group_rows = table.to_pylist()
        texts = [text_of(group_rows[i], self.field, f"{path}, row {i} of row group {number}") for i in rows]
        if self.shuffle_seed is None:
            return texts
        return [texts[i] for i in generator(self.shuffle_seed, ORDER, epoch, group).permutation(len(texts))]
