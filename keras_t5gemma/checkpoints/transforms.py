"""Sources made of other sources, tensor by tensor: in another dtype, or as the mean of several."""

import numpy as np

from keras_t5gemma.checkpoints.tensor_source import CHUNK_BYTES, DTYPES, CheckpointError, TensorSource
from keras_t5gemma.suggestions import check_choice


def cast_tensors(source, dtype):
    """A source in another dtype.

    Args:
        source: a `TensorSource`.
        dtype: "float32", "float16" or "bfloat16"; None for the source as it is, bit for bit.

    Raises:
        ValueError: where `dtype` is none of these.
    """
    known = {str(dtype): dtype for dtype in DTYPES.values()}
    if dtype is None:
        return source
    check_choice(dtype, "dtype", known, others=", or None for the model's")
    return _Cast(source, known[dtype])


class _Derived(TensorSource):
    """What has the names and shapes of another source, and says where that lies."""

    def __init__(self, source, dtype):
        self._source, self._dtype = source, dtype

    def names(self):
        return self._source.names()

    def shape(self, name):
        return self._source.shape(name)

    def dtype(self, name):
        return self._dtype or self._source.dtype(name)

    def where(self, name=None):
        return self._source.where(name)

    def read(self, name):
        flat = np.concatenate([piece.copy() for piece in self.chunks(name)] or [np.empty(0, self.dtype(name))])
        return flat.reshape(self.shape(name))

    def cast(self, name, piece):
        """A piece in this source's dtype.

        Raises:
            CheckpointError: where a finite number becomes infinite.
        """
        with np.errstate(over="ignore"):
            cast = piece.astype(self.dtype(name), copy=False)
        if self.dtype(name) == "float16" and np.isinf(cast).sum() != np.isinf(piece).sum():
            raise CheckpointError(
                f"{self.where(name)}: tensor {name!r} has values up to {np.abs(piece).max():.3g}, too large for "
                f'float16. Use dtype="bfloat16" or "float32".'
            )
        return cast


class _Cast(_Derived):
    def chunks(self, name):
        for piece in self._source.chunks(name):
            yield self.cast(name, piece)


class MeanTensors(_Derived):
    """The weighted mean of checkpoints of one shape, as float64 sums of as many numbers at a time as a piece holds.

    The mean of the last checkpoints of a run is what the paper publishes (arXiv 2504.06225).

    Args:
        sources: `TensorSource`s with the same names and shapes.
        weights: a number a source, positive in sum; equal where None.
        dtype: of the mean; the first source's where None.

    Raises:
        ValueError: where there is no source, or the weights do not fit.
        CheckpointError: where the sources' tensors differ in name or shape.
    """

    def __init__(self, sources, weights=None, dtype=None):
        if not sources:
            raise ValueError("`sources` is empty: a mean needs at least one checkpoint.")
        weights = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(sources) or not np.isfinite(weights).all() or not sum(weights) > 0:
            raise ValueError(
                f"`weights` needs {len(sources)} finite numbers whose sum is positive. Received: {weights}."
            )
        super().__init__(sources[0], cast_tensors(sources[0], dtype).dtype(sources[0].names()[0]) if dtype else None)
        self._sources, self._weights = sources, weights
        for other in sources[1:]:
            if different := sorted(set(other.names()) ^ set(self.names())):
                raise CheckpointError(f"{other.where()} and {self.where()} differ: only one has {different[0]!r}.")
            for name in self.names():
                if tuple(other.shape(name)) != tuple(self.shape(name)):
                    raise CheckpointError(
                        f"{other.where(name)}: tensor {name!r} has shape {tuple(other.shape(name))}. Expected "
                        f"{tuple(self.shape(name))}, as in {self.where(name)}."
                    )

    def chunks(self, name):
        """The mean, in flat pieces."""
        for parts in equal_pieces([(source, name) for source in self._sources]):
            total = np.zeros(len(parts[0]))
            for part, weight in zip(parts, self._weights, strict=True):
                weighted = part.astype("float64")
                weighted *= weight
                total += weighted
            total /= sum(self._weights)  # Last, so that equal weights leave the sums exact.
            yield self.cast(name, total)


def equal_pieces(places):
    """Several tensors in tuples of flat pieces, as many numbers in each, however their sources cut them.

    Args:
        places: a (source, name) a tensor.
    """
    size = CHUNK_BYTES // 4
    yield from zip(*(_pieces_of(source, name, size) for source, name in places), strict=True)


def _pieces_of(source, name, size):
    """A tensor in pieces of exactly `size` numbers but for the last, however the source cuts it."""
    buffer, filled = np.empty(size, source.dtype(name)), 0
    for piece in source.chunks(name):
        start = 0
        while start < piece.size:
            taken = min(size - filled, piece.size - start)
            buffer[filled : filled + taken] = piece[start : start + taken]
            filled, start = filled + taken, start + taken
            if filled == size:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]
