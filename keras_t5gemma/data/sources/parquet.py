"""Parquet files: rows by number, read a row group at a time."""

import bisect
import collections
import copy
import itertools
import threading

import grain

from keras_t5gemma.data.pipelines.streams import ORDER, generator
from keras_t5gemma.data.sources.rows import optional_module, text_of

# Row groups held at a time, in each process: the one in use, and its neighbour where threads read ahead.
_GROUPS_IN_MEMORY = 2


class ParquetRows(grain.MapDataset):
    """Rows of Parquet files, with random access that is cheap where neighbours are asked for together.

    A row group is the least that can be read, so `shuffle` puts groups in random order and rows within each, another in
    each epoch, and never reads a group twice for it. Shuffle before `map`: what is put between is shuffled row by row,
    which reads a group for each.

    Processes share the row groups, or, where there are fewer groups than processes, the rows of each.
    """

    def __init__(self, paths, field, shard_index=0, shard_count=1):
        super().__init__()
        self.field = field
        parquet = optional_module("pyarrow.parquet", f"Reading {paths[0]}")
        groups = []
        for path in paths:
            try:
                metadata = parquet.read_metadata(path)
            except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
                raise ValueError(f"{path} is no Parquet file: {error}") from error
            names = metadata.schema.to_arrow_schema().names
            if field is not None and field not in names:
                raise ValueError(f"{path} has no column {field!r}. It has: {', '.join(names)}.")
            groups += [(path, i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)]
        if len(groups) >= shard_count:
            groups, shard_index, shard_count = groups[shard_index::shard_count], 0, 1
        self.groups = [(path, i, range(shard_index, rows, shard_count)) for path, i, rows in groups]
        self.length = sum(len(rows) for _, _, rows in self.groups)
        self.seed = None
        self._forget()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, index = divmod(index, self.length)
        order, ends = self._order(epoch)
        place = bisect.bisect_right(ends, index)
        group, row = order[place], index - (ends[place - 1] if place else 0)
        texts = self._texts(epoch, group)
        return texts[row]

    def shuffle(self, seed=None):
        """The rows in random order, by groups and within each; another in each epoch."""
        shuffled = copy.copy(self)
        shuffled.seed = 0 if seed is None else seed
        shuffled._forget()
        return shuffled

    def __getstate__(self):
        # Locks and what was read stay behind: a worker reads for itself.
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_cache", "_orders")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._forget()

    def _forget(self):
        self._lock, self._cache, self._orders = threading.Lock(), collections.OrderedDict(), {}

    def _order(self, epoch):
        """The groups' order in an epoch, and the index behind each one's last row."""
        known = self._orders.get(epoch)
        if known is None:
            count = len(self.groups)
            order = range(count) if self.seed is None else generator(self.seed, ORDER, epoch).permutation(count)
            known = order, list(itertools.accumulate(len(self.groups[i][2]) for i in order))
            self._orders = {epoch: known}
        return known

    def _texts(self, epoch, group):
        with self._lock:
            if (epoch, group) not in self._cache:
                while len(self._cache) >= _GROUPS_IN_MEMORY:
                    self._cache.popitem(last=False)
                self._cache[epoch, group] = self._read(epoch, group)
            self._cache.move_to_end((epoch, group))
            return self._cache[epoch, group]

    def _read(self, epoch, group):
        """One row group, or the one that was read last."""
        path, number, rows = self.groups[group]
        parquet = optional_module("pyarrow.parquet", f"Reading {path}")
        with parquet.ParquetFile(path) as file:
            table = file.read_row_group(number, columns=None if self.field is None else [self.field])
        read = table.to_pylist()
        texts = [text_of(read[i], self.field, f"{path}, row {i} of row group {number}") for i in rows]
        if self.seed is None:
            return texts
        return [texts[i] for i in generator(self.seed, ORDER, epoch, int(group)).permutation(len(texts))]
