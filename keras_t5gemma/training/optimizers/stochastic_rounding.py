"""Stochastic rounding of float32 to bfloat16: up or down at random, right on average.

A weight of 0.02 has neighbors 1.2e-4 away in bfloat16. If values are rounded to the nearest, a step of 2e-5 never
changes it, however often it is repeated; rounded at random, the step moves the weight every sixth time
(arXiv 2010.06192). bfloat16 drops the lower half of a float32's bits: 16 random bits are added to this half, and the
carry into the upper half decides.

Random bits are a hash of seed, step, stream and position. So nothing is stored, a run that resumes from a checkpoint
draws the same bits as without the interruption, and so do all backends and all layouts over devices.
"""

import math
from collections.abc import Sequence

from keras import ops

_LOWER_HALF = 0xFFFF
_UPPER_HALF = ~_LOWER_HALF
# murmur3's finalizer (Austin Appleby, public domain), and 2 ** 32 over the golden ratio, as signed integers.
_FACTORS = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)
_GOLDEN = 0x9E3779B9 - 2**32


def random_key(seed: int, step, stream: int):
    """An int32 that differs for each seed, step and stream.

    Args:
        seed: an int.
        step: an int, for which the key is a Python int and no kernels are launched; or an integer scalar tensor.
        stream: an int.

    Returns:
        An int or a scalar tensor, as `step`.
    """
    if isinstance(step, int):
        key = 0
        for part in (seed, step, stream):
            key = _hash_int(((key + part) * _GOLDEN) % 2**32)
        return _signed(key)
    key = _int32(0)
    for part in (seed, step, stream):
        key = _hash(ops.multiply(ops.add(key, ops.cast(part, "int32")), _int32(_GOLDEN)))
    return key


def random_bits(shape: Sequence[int], key, start: int = 0):
    """Uniform random integers from 0 to 65,535, int32.

    Args:
        shape: the array's shape, with fewer than 2 ** 32 elements.
        key: see `random_key`.
        start: if the array is a part of a larger one, the position of its first element in that. The bits are the
            larger array's.

    Returns:
        An int32 tensor of that shape.
    """
    position = _int32(_signed(start * _GOLDEN))
    for axis, size in enumerate(shape):
        # One vector per axis, not a reshaped range: it is sharded over devices without communication.
        stride = _signed(math.prod(shape[axis + 1 :]) * _GOLDEN)
        offsets = ops.multiply(ops.arange(size, dtype="int32"), _int32(stride))
        position = ops.add(position, ops.reshape(offsets, [-1] + [1] * (len(shape) - axis - 1)))
    return ops.bitwise_and(_hash(ops.bitwise_xor(position, key)), _int32(_LOWER_HALF))


def stochastic_round(values, bits):
    """Rounds to one of the two neighbors in bfloat16, the nearer with the larger probability.

    Numbers that bfloat16 represents are unchanged.

    Args:
        values: float32.
        bits: the result of `random_bits` for the same shape.

    Returns:
        bfloat16. Infinities and NaN are unchanged.
    """
    return ops.cast(_add_and_truncate(values, bits), "bfloat16")


def nearest_bfloat16(values):
    """The nearest number that bfloat16 represents, ties to even, as float32.

    It works on the bits, because XLA removes a cast to bfloat16 and back.
    """
    last_bit = ops.bitwise_and(ops.right_shift(ops.view(values, "int32"), _int32(16)), _int32(1))
    half = ops.add(_int32(_LOWER_HALF // 2), last_bit)
    return _add_and_truncate(values, half)


def _add_and_truncate(values, bits):
    """Adds to the lower half of the bits of float32 values, and sets that half to zero."""
    raised = ops.add(ops.view(values, "int32"), bits)
    truncated = ops.view(ops.bitwise_and(raised, _int32(_UPPER_HALF)), "float32")
    return ops.where(ops.isfinite(values), truncated, values)  # a NaN whose bits are all ones would become zero


def _hash(x):
    """murmur3's finalizer of an int32 tensor."""
    for shift, factor in zip((16, 13), _FACTORS, strict=True):
        x = ops.multiply(ops.bitwise_xor(x, _shifted(x, shift)), _int32(factor))
    return ops.bitwise_xor(x, _shifted(x, 16))


def _hash_int(x: int) -> int:
    """`_hash` of a Python int, unsigned."""
    for shift, factor in zip((16, 13), _FACTORS, strict=True):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)


def _int32(value: int):
    """A constant tensor. With a `floatx` of bfloat16, Keras on JAX converts a plain integer to float32."""
    return ops.convert_to_tensor(value, "int32")


def _signed(x: int) -> int:
    """An integer modulo 2 ** 32, in the range of int32."""
    return (x + 2**31) % 2**32 - 2**31


def _shifted(x, count: int):
    """`x` shifted to the right as an unsigned integer."""
    # The shift of a signed integer would fill in its sign.
    return ops.bitwise_and(ops.right_shift(x, _int32(count)), _int32(2 ** (32 - count) - 1))
