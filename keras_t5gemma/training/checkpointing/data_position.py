"""A Grain dataset that knows which of its batches were trained on, however far ahead it is read."""

import json

import grain
import keras
import numpy as np
import xxhash

# Batches prepared ahead, in as many threads: enough to hide their making, and little memory.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
# Grain counts an endless dataset as `sys.maxsize` elements, or so many batches of them; nobody stores as many.
_ENDLESS = 2**40


class NumberedBatches(grain.IterDataset):
    """The batches of a dataset, numbered through all its epochs: what is trained on, by number, can be found again.

    Keras reads ahead of training: a few batches to learn their shapes, more while steps run, and it makes an iterator
    anew when it pleases. So neither an iterator nor its position says what was trained on. Here the callback says where
    iterators begin (`start`) and counts the batches trained on, and each batch that is read leaves under its number
    what it takes to make it again: nothing, where the dataset has random access; else the iterator's state before it.

        read        1  2  3  4  5  6  7      by Keras
        trained on  1  2  3  4               by the callback, which asks for `position(4)`

    A `grain.MapDataset` goes on from one epoch into the next as its `repeat` does, which shuffles anew; a
    `grain.IterDataset` begins as the first time. An iterator ends with the epoch, or never, where `endless` is set.

    Args:
        dataset: a `grain.MapDataset` or `grain.IterDataset` of batches.

    Raises:
        ValueError: where `dataset` is neither.
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
        self.callback = None  # a weak reference to the one that counts what is trained on
        self.source, self.length = dataset, None
        if isinstance(dataset, grain.MapDataset) and len(dataset) < _ENDLESS:
            self.source, self.length = dataset.repeat(), len(dataset)
        self.endless = False
        self.start(0)

    def start(self, number):
        """Has the iterators made from here on begin after `number` batches, with an epoch."""
        self.first = number
        self.ends = None  # the number of the epoch's last batch, from when it is read
        self._ready = None
        self._read = {}
        # Iterators from before may still be read, by threads of their own. What they read is of no interest any more.
        self.generation = object()

    def position(self, number):
        """What `seek` needs to go on after `number` batches, JSON-ready; earlier ones are forgotten.

        Args:
            number: of batches trained on, at least 1.
        """
        # Threads read on meanwhile: a list of the keys is made in one go.
        for old in [key for key in list(self._read) if key < number]:
            self._read.pop(old, None)
        state, batch = self._read[number]
        return {"number": number, "state": state, "last_batch": _description(batch)}

    def batch(self, number):
        """A batch that was read, until `position` of a later one is asked for."""
        return self._read[number][1]

    def seek(self, position):
        """Has the next iterator go on where a run was stopped.

        The last batch trained on is made again and compared with what the run trained on: this proves that texts,
        objective, batch size, seed and position are the same.

        Args:
            position: what `position` gave.

        Returns:
            That batch.

        Raises:
            ValueError: where the batch is another; the message says in what.
        """
        number, expected = position["number"], position["last_batch"]
        self.start(number - 1)
        advice = (
            "Pass the dataset of that run (the same texts, tokenizer, objective, batch_size and seed, by the same "
            "version of Grain) to go on with it, or choose another `folder` to begin anew"
        )
        try:
            iterator = _Iterator(self, position["state"])
            batch = next(iterator)
            found = _description(batch)
        except StopIteration:
            raise ValueError(f"The dataset ends before batch {number}, which the run reached. {advice}.") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"The dataset cannot go to batch {number}: {error!r:.300}. {advice}.") from error
        if found != expected:
            different = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
            name = next((name for name in different if name != "checksum"), "checksum")
            raise ValueError(
                f"Batch {number} of the dataset is not the one the run was trained on: {name} is "
                f"{found.get(name, 'missing')}, and was {expected.get(name, 'missing')}. {advice}."
            )
        self._ready = iterator
        return batch

    def note(self, number, state, batch, last):
        """Remembers a batch that is being read."""
        self._read[number] = state, batch
        if last:
            self.ends = number

    def __iter__(self):
        iterator, self._ready = self._ready, None
        return _Iterator(self) if iterator is None else iterator


class _Iterator(grain.DatasetIterator):
    def __init__(self, batches, state=None):
        super().__init__()
        self._batches, self._generation = batches, batches.generation
        self._number = self._begin = batches.first
        self._open(state)
        self._ahead = self._read()

    def __next__(self):
        if self._ahead is None:
            if not self._batches.endless or self._number == self._begin:
                raise StopIteration
            self._open()
            self._begin = self._number
            self._ahead = self._read()
            return next(self)
        state, batch = self._ahead
        self._number += 1
        # One batch is held back, so that whoever trains on the last of an epoch knows that it is.
        self._ahead = self._read()
        if self._generation is self._batches.generation:
            self._batches.note(self._number, state, batch, last=self._ahead is None)
        return batch

    def get_state(self):
        """For Grain's sake; the position is `NumberedBatches.position`."""
        return {"number": self._number}

    def set_state(self, state):
        """Refused: `NumberedBatches.seek` moves all iterators, and checks that the data are the same."""
        raise ValueError(f"The position of {type(self._batches).__name__} is set by its `seek`. Received: {state}.")

    def _open(self, state=None):
        source = self._batches.source
        self._random_access = isinstance(source, grain.MapDataset)
        if self._random_access:
            source = (source[self._number :] if self._number else source).to_iter_dataset(_READ_OPTIONS)
        self._parent_iterator = iter(source)
        if state is not None:
            self._parent_iterator.set_state(json.loads(state))

    def _read(self):
        """`(state before it, batch)`, or None where the epoch is over."""
        length = self._batches.length
        if length and not self._batches.endless and self._number > self._begin and not self._number % length:
            return None
        # As text, so that what the iterator changes later is not changed here.
        state = None if self._random_access else json.dumps(self._parent_iterator.get_state(), default=_plain)
        try:
            return state, next(self._parent_iterator)
        except StopIteration:
            return None


def _plain(value):
    """Numbers of numpy in a state as Python's."""
    return value.item() if isinstance(value, np.generic) else value.tolist()


def _description(batch):
    """Names, dtypes and shapes of a batch's arrays, and a checksum of their contents."""
    described, checksum = {}, xxhash.xxh3_64()
    for path, leaf in keras.tree.flatten_with_path(batch):
        if leaf is None:
            continue
        array = np.asarray(leaf)
        described["/".join(map(str, path))] = f"{array.dtype} {list(array.shape)}"
        # Strings have no bytes of their own.
        is_text = array.dtype.kind in "OUS"
        checksum.update(repr(array.tolist()).encode() if is_text else np.ascontiguousarray(array))
    return {**described, "checksum": checksum.hexdigest()}
