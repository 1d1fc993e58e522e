"""`TensorSource`, the interface of every checkpoint: named tensors that are read one at a time, strictly."""

import abc

import ml_dtypes
import numpy as np
import xxhash

# What the weights of a Gemma come in, and what safetensors calls it.
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Bytes of a tensor handled at once: a processor's cache holds them while they are read, checked and written.
CHUNK_BYTES = 2**19
# By bytes of an item: the unsigned integer of that size, and the bits of the exponent, which all are set in infinities
# and NaNs and in no other number (IEEE 754).
_EXPONENTS = {
    DTYPES["F32"]: ("uint32", 0x7F800000),
    DTYPES["F16"]: ("uint16", 0x7C00),
    DTYPES["BF16"]: ("uint16", 0x7F80),
}


_BLOCK = 65_536  # numbers


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or of another kind; the message names the file and what is wrong."""


class TensorSource(abc.ABC):
    """Named tensors that are read one at a time: a folder, a model in memory, or tensors computed from either."""

    @abc.abstractmethod
    def names(self):
        """The tensors' names, a list of strings."""

    @abc.abstractmethod
    def shape(self, name):
        """The shape of one tensor, a tuple, without reading it."""

    @abc.abstractmethod
    def dtype(self, name):
        """The numpy dtype of one tensor, without reading it."""

    @abc.abstractmethod
    def read(self, name):
        """One tensor as a numpy array."""

    @abc.abstractmethod
    def where(self, name=None):
        """Where a tensor, or the source as a whole, comes from: text for messages."""

    def chunks(self, name):
        """One tensor's numbers, first to last, in flat pieces of about `CHUNK_BYTES`.

        A piece is valid until the next one is asked for. What is wrong with a tensor may show only after its last.
        """
        yield from flat_pieces(self.read(name))

    def nbytes(self, name):
        """The bytes of one tensor."""
        return int(np.prod(self.shape(name), dtype="int64")) * self.dtype(name).itemsize


def flat_pieces(array):
    """An array's numbers in order, in flat contiguous pieces of about `CHUNK_BYTES`, copied only where they must be."""
    if array.flags.c_contiguous:
        flat, step = array.reshape(-1), CHUNK_BYTES // array.itemsize
        yield from (flat[start : start + step] for start in range(0, flat.size, step))
        return
    rows = max(1, CHUNK_BYTES // max(1, array[0].nbytes))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows]).reshape(-1)


def is_finite(piece):
    """Whether a flat piece holds neither infinities nor NaNs."""
    integer, exponent = _EXPONENTS[piece.dtype]
    # Several times as fast as `numpy.isfinite`, which knows bfloat16 only number by number; in blocks, so that what is
    # computed on the way stays in the cache.
    bits = piece.view(integer)
    blocks = (bits[start : start + _BLOCK] for start in range(0, bits.size, _BLOCK))
    return all(int(np.bitwise_and(block, exponent).max()) != exponent for block in blocks)


def check_finite(source, name, piece):
    """Refuses a piece of a tensor that holds infinities or NaNs.

    Raises:
        CheckpointError: the message names the tensor and where it comes from.
    """
    if not is_finite(piece):
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} holds infinities or NaNs. Pass `allow_non_finite=True` (on the "
            f"command line --allow-non-finite) to keep them."
        )


def checksum(name, dtype, shape):
    """An XXH3 hash to update with a tensor's bytes, begun with what says how to read them.

    So that numbers under another name, in another dtype or of another shape do not pass for the same.
    """
    format_dtype = next(text for text, known in DTYPES.items() if known == dtype)
    return xxhash.xxh3_64(f"{name} {format_dtype} {list(shape)}".encode())
