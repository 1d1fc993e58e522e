"""Stages of Grain pipelines: documents, examples, rows, batches. Each can save its position."""

import collections

import grain
import numpy as np
from absl import flags

from keras_t5gemma.checks import integer
from keras_t5gemma.data.objectives.example import model_arrays
from keras_t5gemma.data.objectives.mixture import Mixture
from keras_t5gemma.data.pipelines.packing import example_lengths, pack, packed_arrays

# What a draw is for; keeps the order of denoisers, the examples' own randomness and that of rows and files apart.
DEAL, EXAMPLE, ROWS, ORDER = 0, 1, 2, 3
# Enough to hide a disk. Grain looks through all that is read ahead at each step, so that its own 16 and 500 would cost
# more than they bring here.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


def generator(seed, *key):
    """The `numpy.random.Generator` that belongs to a key: the same whoever asks, and whenever."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def in_order(dataset, transform, *, seed, shuffle, num_epochs, shuffle_buffer, num_workers):
    """Rows of a source, transformed, epoch after epoch, in the order they are used in.

    A `grain.MapDataset` is shuffled as a whole, each epoch in another order. A `grain.IterDataset` is shuffled
    within a buffer, in which the end of an epoch and the start of the next meet.

    Args:
        dataset: a `grain.MapDataset` or `grain.IterDataset` of rows.
        transform: called with each row, in the workers where there are any. It must make exactly one element of it, so
            that elements come in the same order however many workers there are.
        seed: of the order.
        shuffle: whether to shuffle.
        num_epochs: how often to go through the rows; `None` for ever.
        shuffle_buffer: rows of a buffer.
        num_workers: processes that read and transform; 0 for this one.

    Returns:
        A `grain.IterDataset`.

    Raises:
        ValueError: where the dataset has no rows, or an argument is out of range.
    """
    shuffle_buffer = integer(shuffle_buffer, "shuffle_buffer")
    num_workers = integer(num_workers, "num_workers", least=0)
    if num_workers and not flags.FLAGS.is_parsed():
        # Grain hands absl's flags on to its workers, and fails where the program has not parsed any.
        flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(num_workers=num_workers)
    if isinstance(dataset, grain.MapDataset):
        if not len(dataset):
            raise ValueError("The source has no rows: there is nothing to train on.")
        if shuffle:
            dataset = dataset.shuffle(seed=seed % 2**32)
        return dataset.repeat(num_epochs).map(transform).to_iter_dataset(READ_OPTIONS).mp_prefetch(workers)
    # An empty one would be repeated for ever without a row.
    if next(iter(dataset), dataset) is dataset:
        raise ValueError("The source has no rows: there is nothing to train on.")
    # Workers come before what looks at more than one row, so that their number changes nothing.
    dataset = grain.experimental.RepeatIterDataset(dataset.map(transform).mp_prefetch(workers), num_epochs)
    if not shuffle:
        return dataset
    return grain.experimental.WindowShuffleIterDataset(dataset, window_size=shuffle_buffer, seed=seed % 2**32)


def batches(examples, lengths, special, *, batch_size, seed, pack, pack_buffer, drop_remainder=False):
    """Examples to batches of the model's arrays.

    Args:
        examples: a `grain.IterDataset` of `Example`s.
        lengths: `(S, T)`.
        special: a `SpecialIds`.
        batch_size: B.
        seed: of the order of packed rows.
        pack: whether several examples share a row.
        pack_buffer: examples that are looked at together to pack them.
        drop_remainder: whether a last, smaller batch is left out.

    Returns:
        A `grain.IterDataset` of `(x, y, sample_weight)`.
    """
    if pack:
        rows = PackedRows(examples, lengths, pack_buffer, seed).map(lambda row: packed_arrays(row, *lengths, special))
    else:
        rows = examples.map(lambda example: model_arrays(example, *lengths, special))
    return rows.batch(batch_size, drop_remainder=drop_remainder)


class Deck:
    """A mixture's parts, each as often as its weight says, dealt again and again in another order."""

    def __init__(self, objective, seed):
        self.parts = [part for part, weight in objective.parts for _ in range(weight)]
        self.seed = seed
        self._last = None, None

    def __len__(self):
        return len(self.parts)

    def order(self, epoch, deal):
        """The parts of one deal."""
        if len(self.parts) == 1:
            return self.parts
        key, order = self._last
        if key != (epoch, deal):
            order = [self.parts[i] for i in generator(self.seed, DEAL, epoch, deal).permutation(len(self.parts))]
            # One assignment of both: threads may share the deck.
            self._last = (epoch, deal), order
        return order


class JoinedWindows(grain.IterDataset):
    """Documents [L] joined to a stream, `<eos>` after each, and cut into windows of as many ids as a part takes.

    As `pretraining_dataset` does it in memory, but on one stream from its start to its end. What is left at its end is
    one shorter window.
    """

    def __init__(self, documents, objective, eos, seed):
        super().__init__(documents)
        self.objective, self.eos, self.seed = objective, eos, seed

    def __iter__(self):
        return _JoinedIterator(iter(self._parent), self)


class _JoinedIterator(grain.DatasetIterator):
    def __init__(self, parent, dataset):
        super().__init__(parent)
        self._deck = Deck(dataset.objective, dataset.seed)
        self._seed, self._eos = dataset.seed, dataset.eos
        self._start(number=0, offset=0)

    def __next__(self):
        deal, place = divmod(self._number, len(self._deck))
        part = self._deck.order(0, deal)[place]
        window = self._take(part.raw_length)
        if len(window) < 2:
            raise StopIteration
        rng = generator(self._seed, EXAMPLE, 0, self._number)
        self._number += 1
        return part(window, rng)

    def get_state(self):
        parent = self._waiting[0][0] if self._waiting else self._parent.get_state()
        return {"parent": parent, "offset": self._offset, "number": self._number}

    def set_state(self, state):
        self._parent.set_state(state["parent"])
        self._start(state["number"], state["offset"])

    def _start(self, number, offset):
        self._number = number
        # Documents that are not used up, each with the parent's state before it; and the ids used of the first.
        self._waiting = collections.deque()
        self._offset = offset
        self._length = -offset

    def _take(self, length):
        while self._length < length:
            state = self._parent.get_state()
            try:
                ids = closed(next(self._parent), self._eos)
            except StopIteration:
                break
            if len(ids):
                self._waiting.append((state, ids))
                self._length += len(ids)
        pieces, missing = [], length
        while missing and self._waiting:
            piece = self._waiting[0][1][self._offset : self._offset + missing]
            pieces.append(piece)
            missing -= len(piece)
            self._offset += len(piece)
            if self._offset == len(self._waiting[0][1]):
                self._waiting.popleft()
                self._offset = 0
        self._length -= length - missing
        return np.concatenate(pieces) if pieces else np.empty(0, "int32")


class Pieces(grain.experimental.FlatMapTransform):
    """A document, with its number, to the examples made of it: one, where a part takes it whole.

    A longer one is cut: each piece has a part drawn for it by weight, and as many ids as that takes. A text's end is
    told by `<eos>` in its last piece, unless the part's targets say it anyway. A document that leaves a single id makes
    no example of it.
    """

    def __init__(self, objective, eos, seed):
        self.mixture, self.eos, self.seed = Mixture([(objective, 1)]), eos, seed

    def flat_map(self, element):
        """`(number, ids [L])` to a list of `Example`s."""
        number, ids = element
        rng = generator(self.seed, EXAMPLE, 0, number)
        ids = closed(ids, self.eos)
        examples = []
        while len(ids) > 1:
            part = self.mixture.draw(rng)
            last = ids[:-1] if getattr(part, "closes_targets", False) else ids
            if len(last) <= part.raw_length:
                return [*examples, part(last, rng)] if len(last) > 1 else examples
            # One id alone, or one and its <eos>, would be left of a text: it stays with more.
            take = max(2, min(part.raw_length, len(ids) - 3))
            examples.append(part(ids[:take], rng))
            ids = ids[take:]
        return examples


class PackedRows(grain.IterDataset):
    """`Example`s to rows of them, by `packing.pack`, a buffer at a time.

    Rows come in random order, since packing puts the large examples first. The position is that of the buffer in the
    examples, and the row in the buffer.
    """

    def __init__(self, examples, capacity, buffer, seed):
        super().__init__(examples)
        buffer = integer(buffer, "pack_buffer")
        self.capacity, self.buffer, self.seed = capacity, buffer, seed

    def __iter__(self):
        return _PackedIterator(iter(self._parent), self)


class _PackedIterator(grain.DatasetIterator):
    def __init__(self, parent, dataset):
        super().__init__(parent)
        self._capacity, self._buffer, self._seed = dataset.capacity, dataset.buffer, dataset.seed
        self._rows, self._row, self._number = None, 0, 0
        self._before = None

    def __next__(self):
        while self._rows is None or self._row == len(self._rows):
            if self._rows is not None:
                self._row, self._number = 0, self._number + 1
            self._fill()
            if not self._rows:
                # The examples have ended, and stay so.
                raise StopIteration
        row = self._rows[self._row]
        self._row += 1
        return row

    def get_state(self):
        before = self._parent.get_state() if self._rows is None else self._before
        return {"parent": before, "row": self._row, "number": self._number}

    def set_state(self, state):
        self._parent.set_state(state["parent"])
        self._row, self._number = state["row"], state["number"]
        self._rows = None
        if self._row:
            self._fill()

    def _fill(self):
        self._before = self._parent.get_state()
        examples = []
        for example in self._parent:
            examples.append(example)
            if len(examples) == self._buffer:
                break
        rows = pack([example_lengths(example) for example in examples], self._capacity)
        order = generator(self._seed, ROWS, self._number).permutation(len(rows))
        self._rows = [[examples[i] for i in rows[k]] for k in order]


def closed(ids, eos):
    """A document's ids with `<eos>` behind them, unless a tokenizer put it there or there are none."""
    return ids if not len(ids) or ids[-1] == eos else np.append(ids, np.int32(eos))
