"""A Grain dataset that knows which of its batches were trained on, however far ahead it is read."""

import json
from typing import Any

import grain
import keras
import numpy as np
import xxhash

from keras_t5gemma.data.pipelines.streams import ENDLESS_LENGTH, READ_OPTIONS


class NumberedBatches(grain.IterDataset):
    """The batches of a dataset, numbered over all its epochs, so that the position in it can be saved and restored.

    Keras reads ahead of training: a few batches to learn their shapes, and more while steps run; and it may create a
    new iterator at any time. So the position of an iterator does not say which batches were trained on. Here the
    callback sets where iterators begin (`start`) and counts the batches trained on. For each batch that is read, this
    class records the state that reproduces it: nothing if the dataset has random access, else the iterator's state
    before the batch.

        read        1  2  3  4  5  6  7      by Keras
        trained on  1  2  3  4               by the callback, which calls `position(4)`

    A `grain.MapDataset` continues from one epoch to the next as its `repeat` does, with another order; a
    `grain.IterDataset` begins again as the first time. An iterator ends with the epoch, or never if `endless` is set.

    Args:
        dataset: a `grain.MapDataset` or `grain.IterDataset` of batches.

    Raises:
        ValueError: if `dataset` is neither.
    """

    def __init__(self, dataset):
        if not isinstance(dataset, (grain.MapDataset, grain.IterDataset)):
            raise ValueError(
                f"`dataset` must be a Grain dataset of batches, such as `pretraining_dataset` and `supervised_dataset` "
                f"make, or a dict of rows in memory, for its position to be saved: a `tf.data.Dataset`, a generator or "
                f"a `DataLoader` has none that can be found again. Pass its rows as a dict, with `batch_size`, or as "
                f"`grain.MapDataset.source(rows).batch(...)`. Received: {type(dataset).__name__}."
            )
        super().__init__()
        self.callback = None  # a weak reference to the callback that counts the batches trained on
        self.source, self.length = dataset, None
        if isinstance(dataset, grain.MapDataset) and len(dataset) < ENDLESS_LENGTH:
            self.source, self.length = dataset.repeat(), len(dataset)
        self.endless = False
        self.start(0)

    def start(self, number: int) -> None:
        """Makes iterators that are created from now on begin after `number` batches, with an epoch."""
        self.first = number
        self.ends = None  # the number of the epoch's last batch, once that is read
        self._next_iterator = None
        self._read = {}
        # Older iterators may still be read, by their own threads. The batches that these read are not recorded.
        self.generation = object()

    def position(self, number: int) -> dict:
        """The position after `number` batches, for `seek`, JSON-ready; the records of earlier batches are dropped.

        Args:
            number: batches trained on, at least 1.
        """
        # Threads add batches meanwhile: `list` copies the keys in one atomic step.
        for old in [key for key in list(self._read) if key < number]:
            self._read.pop(old, None)
        state, batch = self._read[number]
        return {"number": number, "state": state, "last_batch": _description(batch)}

    def batch(self, number: int):
        """A batch that was read; available until `position` is called for a later one."""
        return self._read[number][1]

    def seek(self, position: dict):
        """Makes the next iterator continue where a run was stopped.

        The last batch trained on is produced again and compared with the run's: this proves that texts, objective,
        batch size, seed and position are the same.

        Args:
            position: the result of `position` in that run.

        Returns:
            That batch.

        Raises:
            ValueError: if the batch differs; the message names the difference.
        """
        number, expected = position["number"], position["last_batch"]
        self.start(number - 1)
        advice = (
            "Pass the dataset of that run (the same texts, tokenizer, objective, batch_size and seed, by the same "
            "version of Grain) to resume it, or choose another `folder` to begin anew"
        )
        try:
            iterator = _Iterator(self, position["state"])
            batch = next(iterator)
            actual = _description(batch)
        except StopIteration:
            raise ValueError(f"The dataset ends before batch {number}, which the run reached. {advice}.") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"The dataset cannot go to batch {number}: {error!r:.300}. {advice}.") from error
        if actual != expected:
            different = [name for name in sorted({*actual, *expected}) if actual.get(name) != expected.get(name)]
            name = next((name for name in different if name != "checksum"), "checksum")
            raise ValueError(
                f"Batch {number} of the dataset is not the one the run was trained on: {name} is "
                f"{actual.get(name, 'missing')}, and was {expected.get(name, 'missing')}. {advice}."
            )
        self._next_iterator = iterator
        return batch

    def record(self, number: int, state: str | None, batch, last: bool) -> None:
        """Records a batch that an iterator has read.

        Args:
            number: its number.
            state: the iterator's state before it, as JSON, or None if the dataset has random access.
            batch: the batch.
            last: whether it is the last of the epoch.
        """
        self._read[number] = state, batch
        if last:
            self.ends = number

    def __iter__(self):
        iterator, self._next_iterator = self._next_iterator, None
        return _Iterator(self) if iterator is None else iterator


class _Iterator(grain.DatasetIterator):
    """Reads the batches of a `NumberedBatches` and records them there.

    Args:
        batches: the `NumberedBatches`.
        state: the state of the dataset's own iterator to begin with, as JSON, or None.
    """

    def __init__(self, batches: NumberedBatches, state: str | None = None):
        super().__init__()
        self._batches, self._generation = batches, batches.generation
        self._number = self._begin = batches.first
        self._open(state)
        self._upcoming = self._read()

    def __next__(self):
        """The next batch, which is recorded unless the dataset has been started again since."""
        if self._upcoming is None:
            if not self._batches.endless or self._number == self._begin:
                raise StopIteration
            self._open()
            self._begin = self._number
            self._upcoming = self._read()
            return next(self)
        state, batch = self._upcoming
        self._number += 1
        # One batch is read ahead, so that the last batch of an epoch is known as such when it is returned.
        self._upcoming = self._read()
        if self._generation is self._batches.generation:
            self._batches.record(self._number, state, batch, last=self._upcoming is None)
        return batch

    def get_state(self) -> dict:
        """The number of batches read, because Grain requires a state; `NumberedBatches.position` is the position."""
        return {"number": self._number}

    def set_state(self, state: dict) -> None:
        """Raises a ValueError: `NumberedBatches.seek` moves all iterators, and checks that the data are the same."""
        raise ValueError(f"The position of {type(self._batches).__name__} is set by its `seek`. Received: {state}.")

    def _open(self, state: str | None = None) -> None:
        """Creates the iterator of the dataset, at this iterator's position."""
        source = self._batches.source
        self._random_access = isinstance(source, grain.MapDataset)
        if self._random_access:
            source = (source[self._number :] if self._number else source).to_iter_dataset(READ_OPTIONS)
        self._parent_iterator = iter(source)
        if state is not None:
            self._parent_iterator.set_state(json.loads(state))

    def _read(self) -> tuple[str | None, Any] | None:
        """`(state before the batch, batch)`, or None if the epoch is over."""
        length = self._batches.length
        if length and not self._batches.endless and self._number > self._begin and not self._number % length:
            return None
        # As JSON text, because the iterator may change its state object later.
        state = None if self._random_access else json.dumps(self._parent_iterator.get_state(), default=_plain)
        try:
            return state, next(self._parent_iterator)
        except StopIteration:
            return None


def _plain(value: np.generic | np.ndarray):
    """A number or array of numpy in a state as Python numbers."""
    return value.item() if isinstance(value, np.generic) else value.tolist()


def _row_as_array(node) -> np.ndarray | None:
    """A list of numbers, such as the ids of a row, as one array; None for all else."""
    is_row = isinstance(node, list) and bool(node) and all(isinstance(entry, (int, float, np.number)) for entry in node)
    return np.asarray(node) if is_row else None


def _description(batch) -> dict[str, str]:
    """Names, dtypes and shapes of a batch's arrays, and a checksum of their contents."""
    arrays, checksum = {}, xxhash.xxh3_64()
    for path, leaf in keras.tree.flatten_with_path(keras.tree.traverse(_row_as_array, batch)):
        if leaf is None:
            continue
        array = np.asarray(leaf)
        arrays["/".join(map(str, path))] = f"{array.dtype} {list(array.shape)}"
        # An array of strings may hold references, not their bytes.
        is_text = array.dtype.kind in "OUS"
        checksum.update(repr(array.tolist()).encode() if is_text else np.ascontiguousarray(array))
    return {**arrays, "checksum": checksum.hexdigest()}
