"""Stages of Grain pipelines: documents, examples, rows, batches. Each can save its position."""

import collections
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from absl import flags

from keras_t5gemma.checks import integer
from keras_t5gemma.data.objectives.example import Example, Objective, Part, SpecialIds, model_arrays
from keras_t5gemma.data.objectives.mixture import Mixture
from keras_t5gemma.data.pipelines.packing import example_lengths, pack, packed_arrays

# Purpose of a draw, the first number of a `generator`'s key: the order of denoisers, the examples' own randomness, and
# the order of rows and of files do not depend on each other.
DEAL, EXAMPLE, ROWS, ORDER = 0, 1, 2, 3
# Enough to hide the latency of a disk. Grain searches the whole prefetch buffer at each step, so its defaults of 16 and
# 500 would cost more time than they save here.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
# Grain reports the length of an endless dataset as `sys.maxsize`, or that divided by the batch size. A length from
# this limit on cannot be real: no storage holds as many batches.
ENDLESS_LENGTH = 2**40


def generator(seed: int, *key: int) -> np.random.Generator:
    """A `numpy.random.Generator` that depends only on the seed and the key."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def in_order(
    dataset: grain.MapDataset | grain.IterDataset,
    transform: Callable,
    *,
    seed: int,
    shuffle: bool,
    num_epochs: int | None,
    shuffle_buffer: int,
    num_workers: int,
) -> grain.IterDataset:
    """The transformed rows of a source, epoch after epoch, in the order of their use.

    A `grain.MapDataset` is shuffled globally, each epoch in a different order. A `grain.IterDataset` is shuffled
    within a buffer, which may hold the end of one epoch and the start of the next.

    Args:
        dataset: a `grain.MapDataset` or `grain.IterDataset` of rows.
        transform: a function of a row, called in the workers if there are any. It must return exactly one element, so
            that the order of elements does not depend on the number of workers.
        seed: seed of the order.
        shuffle: whether to shuffle.
        num_epochs: number of passes over the rows; `None` for endless data.
        shuffle_buffer: number of rows in the buffer.
        num_workers: processes that read and transform; 0 to use only this process.

    Returns:
        A `grain.IterDataset`.

    Raises:
        ValueError: if the dataset has no rows, or an argument is out of range.
    """
    shuffle_buffer = integer(shuffle_buffer, "shuffle_buffer")
    num_workers = integer(num_workers, "num_workers", least=0)
    if num_workers and not flags.FLAGS.is_parsed():
        # Grain passes absl's flags to its workers, and fails if the program has not parsed them.
        flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(num_workers=num_workers)
    if isinstance(dataset, grain.MapDataset):
        if not len(dataset):
            raise ValueError("The source has no rows: there is nothing to train on.")
        if shuffle:
            dataset = dataset.shuffle(seed=seed % 2**32)
        return dataset.repeat(num_epochs).map(transform).to_iter_dataset(READ_OPTIONS).mp_prefetch(workers)
    # An empty dataset would be repeated for ever without a row.
    if next(iter(dataset), dataset) is dataset:
        raise ValueError("The source has no rows: there is nothing to train on.")
    # Only single rows are transformed in the workers, before the buffer, so that their number changes nothing.
    repeated = grain.experimental.RepeatIterDataset(dataset.map(transform).mp_prefetch(workers), num_epochs)
    if not shuffle:
        return repeated
    return grain.experimental.WindowShuffleIterDataset(repeated, window_size=shuffle_buffer, seed=seed % 2**32)


def batches(
    examples: grain.IterDataset,
    lengths: tuple[int, int],
    special: SpecialIds,
    *,
    batch_size: int,
    seed: int,
    pack: bool,
    pack_buffer: int,
    drop_remainder: bool = False,
) -> grain.IterDataset:
    """Converts examples to batches of the model's arrays.

    Args:
        examples: a `grain.IterDataset` of `Example`s.
        lengths: `(S, T)`.
        special: a `SpecialIds`.
        batch_size: B.
        seed: seed of the order of packed rows.
        pack: whether several examples share a row.
        pack_buffer: number of examples that are packed together.
        drop_remainder: whether a last, smaller batch is left out.

    Returns:
        A `grain.IterDataset` of `(x, y, sample_weight)`.
    """
    encoder_length, decoder_length = lengths
    if pack:
        packed = PackedRows(examples, lengths, pack_buffer, seed)
        rows = packed.map(lambda row: packed_arrays(row, encoder_length, decoder_length, special))
    else:
        rows = examples.map(lambda example: model_arrays(example, encoder_length, decoder_length, special))
    return rows.batch(batch_size, drop_remainder=drop_remainder)


class Deck:
    """The parts of an objective, each as often as its weight says, dealt again and again in a new order."""

    def __init__(self, objective: Objective, seed: int):
        self.parts: list[Any] = [part for part, weight in objective.parts for _ in range(weight)]
        self.seed = seed
        self._last_deal: tuple[tuple[int, int] | None, list[Any]] = None, []

    def __len__(self) -> int:
        return len(self.parts)

    def order(self, epoch: int, deal: int) -> list[Part]:
        """The parts of one deal."""
        if len(self.parts) == 1:
            return self.parts
        key, order = self._last_deal
        if key != (epoch, deal):
            order = [self.parts[i] for i in generator(self.seed, DEAL, epoch, deal).permutation(len(self.parts))]
            # A single assignment, because threads may share the deck.
            self._last_deal = (epoch, deal), order
        return order


class JoinedWindows(grain.IterDataset):
    """Joins documents [L] to a stream, with `<eos>` after each, and cuts it into windows of `raw_length` ids of a part.

    `pretraining_dataset` does the same in memory, but on a circular stream. Here the last window is shorter.
    """

    def __init__(self, documents: grain.IterDataset, objective: Objective, eos: int, seed: int):
        super().__init__(documents)
        self.objective, self.eos, self.draw_seed = objective, eos, seed

    def __iter__(self) -> grain.DatasetIterator:
        return _JoinedIterator(iter(self._parent), self)


class _JoinedIterator(grain.DatasetIterator):
    """Iterator of `JoinedWindows`. Its state is the parent's before the first document with unused ids, and offsets."""

    def __init__(self, parent: grain.DatasetIterator, dataset: JoinedWindows):
        super().__init__(parent)
        self._deck = Deck(dataset.objective, dataset.draw_seed)
        self._seed, self._eos = dataset.draw_seed, dataset.eos
        self._start(number=0, offset=0)

    def __next__(self) -> Example:
        deal, place = divmod(self._number, len(self._deck))
        part = self._deck.order(0, deal)[place]
        window = self._take(part.raw_length)
        if len(window) < 2:
            raise StopIteration
        rng = generator(self._seed, EXAMPLE, 0, self._number)
        self._number += 1
        return part(window, rng)

    def get_state(self) -> dict:
        parent = self._pending[0][0] if self._pending else self._parent.get_state()
        return {"parent": parent, "offset": self._offset, "number": self._number}

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state["parent"])
        self._start(state["number"], state["offset"])

    def _start(self, number: int, offset: int) -> None:
        self._number = number
        # Documents with unused ids, each with the parent's state before it, and the number of used ids of the first.
        self._pending = collections.deque()
        self._offset = offset
        self._num_pending = -offset  # unused ids of all pending documents

    def _take(self, length: int) -> np.ndarray:
        """The next `length` ids of the joined documents; fewer at the end."""
        while self._num_pending < length:
            state = self._parent.get_state()
            try:
                ids = with_eos(next(self._parent), self._eos)
            except StopIteration:
                break
            if len(ids):
                self._pending.append((state, ids))
                self._num_pending += len(ids)
        pieces, missing = [], length
        while missing and self._pending:
            piece = self._pending[0][1][self._offset : self._offset + missing]
            pieces.append(piece)
            missing -= len(piece)
            self._offset += len(piece)
            if self._offset == len(self._pending[0][1]):
                self._pending.popleft()
                self._offset = 0
        self._num_pending -= length - missing
        return np.concatenate(pieces) if pieces else np.empty(0, "int32")


class Pieces(grain.experimental.FlatMapTransform):
    """Makes examples of a numbered document: a single one if it fits a part, else several.

    A longer document is cut. For each piece a part is drawn by weight, and takes as many ids as it can. The last piece
    has `<eos>` at its end, unless the part's targets are closed anyway. A single remaining id gives no example.
    """

    def __init__(self, objective: Objective, eos: int, seed: int):
        self.mixture, self.eos, self.seed = Mixture([(objective, 1)]), eos, seed

    def flat_map(self, element: tuple[int, np.ndarray]) -> list[Example]:
        """Makes a list of `Example`s of `(number, ids [L])`."""
        number, ids = element
        rng = generator(self.seed, EXAMPLE, 0, number)
        ids = with_eos(ids, self.eos)
        examples = []
        while len(ids) > 1:
            part = self.mixture.draw(rng)
            last = ids[:-1] if getattr(part, "closes_targets", False) else ids
            if len(last) <= part.raw_length:
                return [*examples, part(last, rng)] if len(last) > 1 else examples
            # At least three ids remain: one id, or one id and its <eos>, would be too few for an example.
            size = max(2, min(part.raw_length, len(ids) - 3))
            examples.append(part(ids[:size], rng))
            ids = ids[size:]
        return examples


class PackedRows(grain.IterDataset):
    """Packs `Example`s into rows by `packing.pack`, one buffer of examples at a time.

    The rows of a buffer come in random order, because packing puts the large examples first. The position is that of
    the buffer in the examples and of the row in the buffer.
    """

    def __init__(self, examples: grain.IterDataset, capacity: tuple[int, int], buffer: int, seed: int):
        super().__init__(examples)
        buffer = integer(buffer, "pack_buffer")
        self.capacity, self.buffer, self.draw_seed = capacity, buffer, seed

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(iter(self._parent), self)


class _PackedIterator(grain.DatasetIterator):
    """Iterator of `PackedRows`. Its state is the parent's before the current buffer, and the row in the buffer."""

    def __init__(self, parent: grain.DatasetIterator, dataset: PackedRows):
        super().__init__(parent)
        self._capacity, self._buffer, self._seed = dataset.capacity, dataset.buffer, dataset.draw_seed
        self._rows: list[list[Example]] | None = None
        self._row, self._number = 0, 0  # index of the row in the buffer, and of the buffer
        self._state_before: Any = None  # the parent's, before the buffer

    def __next__(self) -> list[Example]:
        while self._rows is None or self._row == len(self._rows):
            if self._rows is not None:
                self._row, self._number = 0, self._number + 1
            self._rows = self._next_rows()
            if not self._rows:
                # The examples have ended, and further calls end here too.
                raise StopIteration
        row = self._rows[self._row]
        self._row += 1
        return row

    def get_state(self) -> dict:
        parent = self._parent.get_state() if self._rows is None else self._state_before
        return {"parent": parent, "row": self._row, "number": self._number}

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state["parent"])
        self._row, self._number = state["row"], state["number"]
        self._rows = None
        if self._row:
            self._rows = self._next_rows()

    def _next_rows(self) -> list[list[Example]]:
        """Packs the next examples into rows, in a random order."""
        self._state_before = self._parent.get_state()
        examples = []
        for example in self._parent:
            examples.append(example)
            if len(examples) == self._buffer:
                break
        rows = pack([example_lengths(example) for example in examples], self._capacity)
        order = generator(self._seed, ROWS, self._number).permutation(len(rows))
        return [[examples[i] for i in rows[k]] for k in order]


def with_eos(ids: np.ndarray, eos: int) -> np.ndarray:
    """A document's ids with `<eos>` at the end, unless the tokenizer has added it or there are no ids."""
    return ids if not len(ids) or ids[-1] == eos else np.append(ids, np.int32(eos))
