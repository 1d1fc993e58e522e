"""`TensorSource`, the interface of every checkpoint: named tensors that are read one at a time, strictly."""

import abc
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np
import xxhash

# The dtypes of a Gemma's weights, by their names in safetensors.
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Bytes of a tensor that are handled at once. They fit in a processor's cache while they are read, checked and written.
CHUNK_BYTES = 2**19
# For each dtype: the unsigned integer of the same size, and the exponent's bits. In infinities and NaNs all of these
# bits are set, in finite numbers never (IEEE 754).
_EXPONENTS = {
    DTYPES["F32"]: ("uint32", 0x7F800000),
    DTYPES["F16"]: ("uint16", 0x7C00),
    DTYPES["BF16"]: ("uint16", 0x7F80),
}
_BLOCK = 65_536  # numbers that are checked at once


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete or of another kind. The message names the file and the fault."""


class TensorSource(abc.ABC):
    """Named tensors that are read one at a time: a folder, a model in memory, or tensors computed from either."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """The tensors' names."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """The numpy dtype of one tensor, without reading it."""

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a numpy array."""

    @abc.abstractmethod
    def where(self, name: str | None = None) -> str:
        """The origin of a tensor, or without a name of the whole source, for messages: a path, for example."""

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Reads one tensor, first number to last, in flat pieces of about `CHUNK_BYTES`.

        A piece is valid until the caller takes the next one. Damage may be noticed only after the last piece.
        """
        yield from flat_pieces(self.read(name))

    def nbytes(self, name: str) -> int:
        """The size of one tensor in bytes."""
        return int(np.prod(self.shape(name), dtype="int64")) * self.dtype(name).itemsize


def flat_pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array's numbers in order, in flat contiguous pieces of about `CHUNK_BYTES`; copies only if it must."""
    if array.flags.c_contiguous:
        flat, step = array.reshape(-1), CHUNK_BYTES // array.itemsize
        yield from (flat[start : start + step] for start in range(0, flat.size, step))
        return
    rows = max(1, CHUNK_BYTES // max(1, array[0].nbytes))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows]).reshape(-1)


def is_finite(piece: np.ndarray) -> bool:
    """Whether a flat piece holds neither infinities nor NaNs."""
    integer, exponent = _EXPONENTS[piece.dtype]
    # Several times as fast as `numpy.isfinite`, which handles bfloat16 number by number. In blocks, so that
    # intermediate results stay in the cache.
    bits = piece.view(integer)
    blocks = (bits[start : start + _BLOCK] for start in range(0, bits.size, _BLOCK))
    return all(int(np.bitwise_and(block, exponent).max()) != exponent for block in blocks)


def check_finite(source: TensorSource, name: str, piece: np.ndarray) -> None:
    """Refuses a piece of a tensor that holds infinities or NaNs.

    Args:
        source: the `TensorSource` that the piece was read from.
        name: the tensor's name.
        piece: some of the tensor's numbers, flat.

    Raises:
        CheckpointError: if it holds any; the message names the tensor and its origin.
    """
    if not is_finite(piece):
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} holds infinities or NaNs. Pass `allow_non_finite=True` (on the "
            f"command line --allow-non-finite) to keep them."
        )


def checksum(name: str, dtype: np.dtype, shape: Sequence[int]) -> xxhash.xxh3_64:
    """Starts the XXH3 hash of a tensor, which the caller updates with the tensor's bytes.

    Name, dtype and shape are hashed first, so that equal bytes under another name, in another dtype or of another shape
    have another checksum.

    Args:
        name: the tensor's name.
        dtype: one of the values of `DTYPES`.
        shape: the tensor's shape.

    Returns:
        An `xxhash.xxh3_64`.
    """
    format_dtype = next(format_name for format_name, candidate in DTYPES.items() if candidate == dtype)
    return xxhash.xxh3_64(f"{name} {format_dtype} {list(shape)}".encode())
