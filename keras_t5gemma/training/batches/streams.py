"""An iterable of batches as a dataset that Keras reads: each batch once, even if Keras looks ahead."""

import threading

import grain
import keras
import numpy as np

_END = object()


class Stream:
    """Passes over an iterable of batches.

    Keras reads a few batches before a run, to know their shapes, and starts from the beginning then. A generator has no
    beginning to go back to, and a `PyDataset` may do something at the start of an epoch: so what is read before `begin`
    is kept and given again.

    Args:
        open_pass: called for each pass, gives an iterator of batches.
        once: whether there is one pass only, as of a generator.
        endless: whether a pass follows another in the same iterator, for a run that is told its steps.
    """

    def __init__(self, open_pass, *, once=False, endless=False):
        self._open_pass, self._once, self._endless = open_pass, once, endless and not once
        self._lock = threading.Lock()
        self._read_ahead = []
        self._began = False
        self._pass, self._used_up = None, False
        self._newest = 0

    def begin(self):
        """From here on batches that are read are used."""
        self._began = True

    def first(self):
        """The first batch, which is given again; None if there is none."""
        return next(iter(self), None)

    def __iter__(self):
        with self._lock:
            self._newest += 1
            number, position = self._newest, 0
        while True:
            with self._lock:
                if number != self._newest:
                    return  # left behind by whoever reads on from here
                if position < len(self._read_ahead):
                    batch = self._read_ahead[position]
                else:
                    batch = self._next()
                    if batch is _END:
                        return
                    self._read_ahead.append(batch)
                position += 1
                if self._began:
                    del self._read_ahead[:position]
                    position = 0
            yield batch

    def _next(self):
        fresh = self._pass is None
        if fresh:
            if self._used_up:
                return _END
            self._pass = self._open_pass()
        batch = next(self._pass, _END)
        if batch is not _END:
            return batch
        self._pass, self._used_up = None, self._once
        # A pass of nothing would be followed by others for ever.
        return self._next() if self._endless and not fresh else _END


class GrainStream(grain.IterDataset):
    """A `Stream` as the kind of dataset that Keras reads on JAX and PyTorch.

    Args:
        stream: the `Stream`.
    """

    def __init__(self, stream):
        super().__init__()
        self._stream = stream

    def __iter__(self):
        return _GrainIterator(iter(self._stream))


class _GrainIterator(grain.DatasetIterator):
    def __init__(self, batches):
        super().__init__()
        self._batches = batches

    def __next__(self):
        return next(self._batches)

    def get_state(self):
        raise TypeError("The position in an iterable cannot be saved. Use a Grain dataset.")

    def set_state(self, state):  # noqa: ARG002 Grain's
        raise TypeError("The position in an iterable cannot be restored. Use a Grain dataset.")


def tensorflow_dataset(stream):
    """A `Stream` as a `tf.data.Dataset`, whose batches may each have another number of rows and another length.

    Keras would take the shapes of the first eight batches for those of all.
    """
    import tensorflow as tf

    def spec(array):
        array = np.asarray(array)
        return tf.TensorSpec([None] * array.ndim, array.dtype)

    signature = keras.tree.map_structure(spec, stream.first())
    return tf.data.Dataset.from_generator(lambda: iter(stream), output_signature=signature).prefetch(tf.data.AUTOTUNE)


def dataset_of_stream(stream):
    """A `Stream` of `(x, y, sample_weight)` as Keras reads it on the backend at hand."""
    # Keras's own conversion for TensorFlow fixes the shapes, see `tensorflow_dataset`.
    return tensorflow_dataset(stream) if keras.config.backend() == "tensorflow" else GrainStream(stream)
