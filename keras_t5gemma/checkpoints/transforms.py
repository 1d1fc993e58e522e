"""Sources computed from other sources, tensor by tensor: a cast to another dtype, and the mean of several."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from keras_t5gemma.checkpoints.tensor_source import CHUNK_BYTES, DTYPES, CheckpointError, TensorSource
from keras_t5gemma.suggestions import check_choice


def cast_tensors(source: TensorSource, dtype: str | None) -> TensorSource:
    """A source whose tensors are cast to another dtype as they are read.

    Args:
        source: a `TensorSource`.
        dtype: "float32", "float16" or "bfloat16"; None for the source as it is, bit for bit.

    Raises:
        ValueError: if `dtype` is invalid.
    """
    dtypes = {str(candidate): candidate for candidate in DTYPES.values()}
    if dtype is None:
        return source
    check_choice(dtype, "dtype", dtypes, others=", or None for the model's")
    return _Cast(source, dtypes[dtype])


class _Derived(TensorSource):
    """Base of a source with the names, shapes and origins of another source, and with its own `chunks`."""

    def __init__(self, source: TensorSource, dtype: np.dtype | None):
        self._source, self._dtype = source, dtype

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._dtype or self._source.dtype(name)

    def where(self, name: str | None = None) -> str:
        return self._source.where(name)

    def read(self, name: str) -> np.ndarray:
        flat = np.concatenate([piece.copy() for piece in self.chunks(name)] or [np.empty(0, self.dtype(name))])
        return flat.reshape(self.shape(name))

    def cast(self, name: str, piece: np.ndarray) -> np.ndarray:
        """Casts a piece of a tensor to this source's dtype.

        Raises:
            CheckpointError: if a finite number becomes infinite.
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
    """A source in another dtype."""

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        for piece in self._source.chunks(name):
            yield self.cast(name, piece)


class MeanTensors(_Derived):
    """The weighted mean of checkpoints of one shape, computed in float64, one piece of a tensor at a time.

    The paper publishes the mean of the last checkpoints of a run (arXiv 2504.06225).

    Args:
        sources: `TensorSource`s with the same names and shapes.
        weights: one number per source, with a positive sum; equal if None.
        dtype: the dtype of the mean; the first source's if None.

    Raises:
        ValueError: if there are no sources, or the weights do not fit.
        CheckpointError: if the sources' tensors differ in name or shape.
    """

    def __init__(
        self, sources: Sequence[TensorSource], weights: Iterable[float] | None = None, dtype: str | None = None
    ):
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

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """The mean of one tensor, in flat pieces."""
        for parts in equal_pieces([(source, name) for source in self._sources]):
            total = np.zeros(len(parts[0]))
            for part, weight in zip(parts, self._weights, strict=True):
                weighted = part.astype("float64")
                weighted *= weight
                total += weighted
            total /= sum(self._weights)  # Dividing last keeps the sums exact for equal weights.
            yield self.cast(name, total)


def equal_pieces(tensors: Iterable[tuple[TensorSource, str]]) -> Iterator[tuple[np.ndarray, ...]]:
    """Reads several tensors of one size in parallel, in flat pieces of equal length, however their sources cut them.

    Args:
        tensors: (source, name) of each tensor.

    Yields:
        One piece per tensor. The pieces are valid until the next ones are taken.
    """
    size = CHUNK_BYTES // 4
    yield from zip(*(_pieces_of(source, name, size) for source, name in tensors), strict=True)


def _pieces_of(source: TensorSource, name: str, size: int) -> Iterator[np.ndarray]:
    """Reads a tensor in pieces of exactly `size` numbers; the last piece may be shorter."""
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
