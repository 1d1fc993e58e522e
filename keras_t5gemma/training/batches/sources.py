"""The data of `fit`, `evaluate` and `predict` as a dataset of batches that Keras reads on every backend."""

import dataclasses
import itertools
import random
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import grain
import keras
import numpy as np

from keras_t5gemma.data.pipelines.streams import ENDLESS_LENGTH, READ_OPTIONS
from keras_t5gemma.training.batches.arrays import (
    FORM,
    HUGGING_FACE_NAMES,
    INPUT_NAMES,
    LABELS,
    TEXT_NAMES,
    described,
    to_numpy,
    to_rows,
    unpacked,
)
from keras_t5gemma.training.batches.rows import training_batches
from keras_t5gemma.training.batches.streams import Stream, dataset_of_stream
from keras_t5gemma.training.losses.labels import IGNORED_LABEL

# The number of batches that are prepared ahead, in as many threads. Grain's default of 500 would preprocess whole
# passes ahead.
_READ_AHEAD = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)


@dataclasses.dataclass
class Batches:
    """A dataset for Keras.

    Attributes:
        dataset: a Grain dataset or a `tf.data.Dataset` of `(x, y, sample_weight)`.
        steps: batches per pass over it, None if unknown.
        stream: the `Stream` that the dataset reads, or None.
    """

    dataset: typing.Any
    steps: int | None = None
    stream: Stream | None = None


class BatchSource:
    """A user's data as `Batches`.

    Args:
        data: a mapping in memory (texts or token ids, a `BatchEncoding`); a Hugging Face `datasets.Dataset`; or
            batches: a `tf.data.Dataset`, a Grain dataset or loader, a `keras.utils.PyDataset`, a
            `torch.utils.data.DataLoader`, a generator, or another iterable.
        y: labels, for a mapping.
        sample_weight: weights, for a mapping.
        batch_size: rows per batch, for rows in memory; 32 if None.
        shuffle: whether rows in memory, or the batches of a `PyDataset`, are read in another order each epoch.
        steps_name: the name of the argument with the number of batches, for errors.

    Raises:
        ValueError: if the data have another form, or `y`, `sample_weight` or `batch_size` are passed with batches.
    """

    def __init__(
        self,
        data,
        y=None,
        sample_weight=None,
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        steps_name: str = "steps",
    ):
        self.data, self.steps_name = data, steps_name
        self.shuffle = shuffle
        if isinstance(data, Mapping):
            if not {"encoder_token_ids", "input_ids", *TEXT_NAMES} & set(data):
                raise ValueError(f"{FORM} Received: {described(data)}.")
            self.data = _in_memory(data, y, sample_weight, batch_size, shuffle)
            self.steps = len(self.data)
            return
        if _is_of("datasets", "Dataset", data):
            columns = [name for name in data.column_names if name in _COLUMNS]
            if not columns:
                raise ValueError(f"{FORM} Received: a datasets.Dataset with the columns {data.column_names}.")
            _check_none(data, y=y, sample_weight=sample_weight)
            self.data = _rows_of_dataset(data.select_columns(columns), batch_size, shuffle)
            self.steps = len(self.data)
            return
        if _is_of("datasets", "IterableDataset", data):
            _check_none(data, y=y, sample_weight=sample_weight)
            self.data = _RowsInBatches(data, batch_size or 32)
        elif not _is_batches(data):
            raise ValueError(f"{FORM} Or pass a dataset or generator of such batches. Received: {described(data)}.")
        if self.data is data:
            _check_none(data, y=y, sample_weight=sample_weight, batch_size=batch_size)
        self.steps = _length(self.data)
        if never_ends(self.data):
            self.steps = None

    def batches(
        self, to_arrays: Callable, *, steps: int | None = None, passes: int = 1, unpack: Callable = unpacked
    ) -> Batches:
        """The data as a dataset for Keras.

        Args:
            to_arrays: `(x, y, sample_weight)` of a batch to the model's arrays.
            steps: the number of batches that the user wants per pass, or None for all.
            passes: the number of passes over the data.
            unpack: a batch of the data to `(x, y, sample_weight)`.

        Raises:
            ValueError: if the data are empty; or if they never end, or cannot be read as often, and `steps` is None.
        """
        data = self.data
        if steps is None and never_ends(data):
            raise ValueError(
                f"The data never end: pass `{self.steps_name}`, how many batches to take. Received: a "
                f"{type(data).__name__} without end, {self.steps_name}=None."
            )
        mapped = partial(_mapped, to_arrays, unpack)
        if _is_of("tensorflow", "data.Dataset", data):
            tf = sys.modules["tensorflow"]
            dataset = data.map(lambda *batch: mapped(batch if len(batch) > 1 else batch[0]), tf.data.AUTOTUNE)
            return Batches(dataset.prefetch(tf.data.AUTOTUNE))
        if isinstance(data, grain.MapDataset):
            dataset = data.map(mapped)
            if self.steps is None:
                return Batches(dataset.to_iter_dataset(READ_OPTIONS))
            return Batches(dataset.repeat(passes).to_iter_dataset(_READ_AHEAD), self.steps)
        if isinstance(data, grain.IterDataset):
            return Batches(data.map(mapped))
        once = isinstance(data, Iterator)
        if once and steps is None and passes > 1:
            raise ValueError(
                f"A generator can be gone through once, and is to be {passes} times: pass `{self.steps_name}`, how "
                f"many batches to take each time, or a `keras.utils.PyDataset`. Received: {self.steps_name}=None."
            )
        has_steps = steps is not None or self.steps is not None
        stream = Stream(partial(self._one_pass, mapped), once=once, endless=has_steps)
        if stream.first() is None:
            raise ValueError(f"The data hold no batch. Received: an empty {type(data).__name__}.")
        return Batches(dataset_of_stream(stream), self.steps, stream)

    def _one_pass(self, mapped: Callable) -> Iterator:
        """The arrays of each batch, once through the data."""
        if isinstance(self.data, keras.utils.PyDataset):
            return map(mapped, _pass_of(self.data, self.shuffle))
        return map(mapped, iter(self.data))


class Reopened:
    """An iterable that opens its iterator anew for each pass.

    Args:
        open_pass: `() -> iterator of batches`.
        endless: whether an iterator never ends.
    """

    def __init__(self, open_pass: Callable[[], Iterator], endless: bool = False):
        self._open_pass, self.endless = open_pass, endless

    def __iter__(self):
        return iter(self._open_pass())


def _is_batches(data) -> bool:
    """Whether data may be an iterable of batches."""
    if isinstance(data, keras.utils.PyDataset):
        return True
    return isinstance(data, Iterable) and not isinstance(data, (str, bytes, list, tuple)) and not hasattr(data, "shape")


def never_ends(data) -> bool:
    """Whether a dataset is known to be endless."""
    if isinstance(data, Reopened):
        return data.endless
    if isinstance(data, grain.MapDataset):
        length = _length(data)
        return length is None or length >= ENDLESS_LENGTH
    if isinstance(data, grain.IterDataset):
        if hasattr(data, "_num_epochs"):  # Grain's own `repeat`
            return data._num_epochs is None
        parents = getattr(data, "_parents", ())
        return "Limit" not in type(data).__name__ and bool(parents) and all(map(never_ends, parents))
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches is None
    return _is_of("tensorflow", "data.Dataset", data) and int(data.cardinality()) == _infinite()


def _infinite() -> int:
    return int(sys.modules["tensorflow"].data.INFINITE_CARDINALITY)


def _is_of(module: str, name: str, data) -> bool:
    """Whether data is an instance of a library's class; the library is not imported to find out."""
    attribute = sys.modules.get(module)
    for part in name.split("."):
        attribute = getattr(attribute, part, None)
    return attribute is not None and isinstance(data, attribute)


def _length(data) -> int | None:
    """The number of batches; None if unknown."""
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches
    if isinstance(data, grain.IterDataset) or _is_of("tensorflow", "data.Dataset", data):
        return None
    try:
        return len(data)
    except (TypeError, OverflowError):  # no length, or Grain's for a batched dataset that repeats for ever
        return None


def _mapped(to_arrays: Callable, unpack: Callable, batch):
    return to_arrays(*unpack(batch))


def _pass_of(dataset: keras.utils.PyDataset, shuffle: bool) -> Iterator:
    """The batches of one epoch of a `PyDataset`."""
    dataset.on_epoch_begin()
    count = dataset.num_batches
    order = list(range(count)) if count is not None else itertools.count()
    if shuffle and count is not None:
        random.shuffle(order)
    for i in order:
        yield dataset[i]
    dataset.on_epoch_end()


# The columns of a Hugging Face dataset that are read; others, such as an id, are dropped, as by `transformers.Trainer`.
_COLUMNS = {*INPUT_NAMES, *TEXT_NAMES, *HUGGING_FACE_NAMES, LABELS}
_FILLS = {LABELS: IGNORED_LABEL, "y": IGNORED_LABEL}


def _in_memory(x: Mapping, y, sample_weight, batch_size: int | None, shuffle: bool) -> grain.MapDataset:
    """Batches of rows in memory.

    Args:
        x: a mapping of texts, or of token ids; lists of ids become arrays, padded to the longest of all rows.
        y: labels or None.
        sample_weight: weights or None.
        batch_size: rows per batch; 32 if None.
        shuffle: whether each epoch has another order.
    """
    if not {"encoder_token_ids", "input_ids"} & set(x):  # texts, or a form that later raises an error
        columns = dict(x)
    else:
        columns = {name: _column(name, value) for name, value in x.items()}
    y, weights = _column("y", y), _column("sample_weight", sample_weight)
    return training_batches(columns, y, weights, batch_size=batch_size, shuffle=shuffle)


def _check_none(data, **arguments) -> None:
    """Raises a ValueError if an argument is passed that the batches themselves hold."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be left out: a {type(data).__name__} holds whole batches, with labels and weights if "
                f"there are any. {FORM} Received: {name}={value if isinstance(value, int) else described(value)}."
            )


def _rows_of_dataset(dataset, batch_size: int | None, shuffle: bool) -> grain.MapDataset:
    """Batches of a `datasets.Dataset`, its ids padded to the longest of all rows.

    Args:
        dataset: the `datasets.Dataset`.
        batch_size: rows per batch; 32 if None.
        shuffle: whether each epoch has another order.
    """
    ids = [name for name in dataset.column_names if name not in TEXT_NAMES]
    longest = dict.fromkeys(ids, 0)
    for batch in dataset.select_columns(ids).iter(1000) if ids else ():
        longest = {name: max(longest[name], *map(len, batch[name])) for name in ids}

    def batch(numbers):
        columns = dataset[np.asarray(numbers).tolist()]
        return {
            name: to_rows(name, list(column), _FILLS.get(name, 0), width=longest[name]) if name in longest else column
            for name, column in columns.items()
        }

    rows = grain.MapDataset.range(len(dataset))
    if shuffle:
        rows = rows.shuffle(seed=random.getrandbits(31))
    return rows.batch(batch_size or 32).map(batch)


def _column(name: str, value):
    """A column as an array; texts, and None, are returned unchanged."""
    if value is None or name in TEXT_NAMES or isinstance(value, (str, bytes)):
        return value
    if hasattr(value, "to_list") and hasattr(value, "row_lengths"):
        value = value.to_list()
    if isinstance(value, (list, tuple)):
        return to_rows(name, value, _FILLS.get(name, 0), "float32" if name == "sample_weight" else "int32")
    return to_numpy(value)


class _RowsInBatches:
    """Iterates over a `datasets.IterableDataset` in batches."""

    def __init__(self, dataset, batch_size: int):
        self.dataset, self.batch_size = dataset, batch_size

    def __iter__(self):
        for batch in self.dataset.iter(self.batch_size):
            yield {name: column for name, column in batch.items() if name in _COLUMNS}
