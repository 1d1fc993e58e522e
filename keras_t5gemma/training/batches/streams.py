"""An iterable of batches as a dataset that Keras reads: each batch once, even if Keras looks ahead."""

import threading
from collections.abc import Callable, Iterator

import grain
import keras
import numpy as np

_END = object()


class Stream:
    """Passes over an iterable of batches.

    Keras reads a few batches before a run, to learn their shapes, and then starts from the beginning. A generator
    cannot be restarted, and a `PyDataset` may have side effects at the start of an epoch. So batches that are read
    before `begin` are kept and returned again.

    Args:
        open_pass: `() -> iterator of batches`, called for each pass.
        once: whether only one pass is possible, as with a generator.
        endless: whether an iterator continues with the next pass, for a run with a number of steps.
    """

    def __init__(self, open_pass: Callable[[], Iterator], *, once: bool = False, endless: bool = False):
        self._open_pass, self._once, self._endless = open_pass, once, endless and not once
        self._lock = threading.Lock()
        self._read_ahead = []
        self._began = False
        self._pass, self._is_exhausted = None, False
        self._newest = 0

    def begin(self) -> None:
        """Marks the start of a run: batches that are read from now on are used, and not kept."""
        self._began = True

    def first(self):
        """The first batch, which the next iterator returns again; None if there is no batch."""
        return next(iter(self), None)

    def __iter__(self):
        """Reads from the beginning of the pass, or after the batches that are used already; ends older iterators."""
        with self._lock:
            self._newest += 1
            number, position = self._newest, 0
        while True:
            with self._lock:
                if number != self._newest:
                    return  # a newer iterator has replaced this one
                if position < len(self._read_ahead):
                    batch = self._read_ahead[position]
                else:
                    batch = self._next_batch()
                    if batch is _END:
                        return
                    self._read_ahead.append(batch)
                position += 1
                if self._began:
                    del self._read_ahead[:position]
                    position = 0
            yield batch

    def _next_batch(self):
        """The next batch of this pass, or `_END`."""
        is_new_pass = self._pass is None
        if is_new_pass:
            if self._is_exhausted:
                return _END
            self._pass = self._open_pass()
        batch = next(self._pass, _END)
        if batch is not _END:
            return batch
        self._pass, self._is_exhausted = None, self._once
        # An empty pass ends the iterator, which would otherwise open passes for ever.
        return self._next_batch() if self._endless and not is_new_pass else _END


class GrainStream(grain.IterDataset):
    """A `Stream` as a Grain dataset, which Keras reads on JAX and PyTorch.

    Args:
        stream: the `Stream`.
    """

    def __init__(self, stream: Stream):
        super().__init__()
        self._stream = stream

    def __iter__(self):
        return _GrainIterator(iter(self._stream))


class _GrainIterator(grain.DatasetIterator):
    """The iterator of a `GrainStream`, whose position cannot be saved."""

    def __init__(self, batches: Iterator):
        super().__init__()
        self._batches = batches

    def __next__(self):
        return next(self._batches)

    def get_state(self):
        raise TypeError("The position in an iterable cannot be saved. Use a Grain dataset.")

    def set_state(self, state):  # noqa: ARG002 Grain's
        raise TypeError("The position in an iterable cannot be restored. Use a Grain dataset.")


def tensorflow_dataset(stream: Stream):
    """A `Stream` as a `tf.data.Dataset`, whose batches may differ in their numbers of rows and lengths.

    Keras's own conversion would take the shapes of the first eight batches for the shapes of all.
    """
    return _of_any_shape(stream.first(), lambda: iter(stream))


def dataset_of_any_width(dataset: grain.IterDataset):
    """A Grain dataset whose batches differ in length, as Keras reads it on the current backend."""
    if keras.config.backend() != "tensorflow":
        return dataset
    return _of_any_shape(next(iter(dataset)), lambda: iter(dataset))


def _of_any_shape(first, open_pass: Callable[[], Iterator]):
    """A `tf.data.Dataset` of batches of the structure, the dtypes and the numbers of axes of the first one."""
    import tensorflow as tf

    def spec(array):
        array = np.asarray(array)
        return tf.TensorSpec([None] * array.ndim, array.dtype)

    signature = keras.tree.map_structure(spec, _without_nones(first))
    dataset = tf.data.Dataset.from_generator(lambda: map(_without_nones, open_pass()), output_signature=signature)
    return dataset.prefetch(tf.data.AUTOTUNE)


def _without_nones(batch):
    """`(x, y, sample_weight)` without the weights, or labels and weights, that are None: not a tensor of TensorFlow."""
    if isinstance(batch, tuple):
        while len(batch) > 1 and batch[-1] is None:
            batch = batch[:-1]
    return batch


def dataset_of_stream(stream: Stream):
    """A `Stream` of `(x, y, sample_weight)` as a dataset that Keras reads on the current backend."""
    # Keras's own conversion for TensorFlow fixes the shapes, see `tensorflow_dataset`.
    return tensorflow_dataset(stream) if keras.config.backend() == "tensorflow" else GrainStream(stream)
