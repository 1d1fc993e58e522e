"""Stochastic rounding of float32 to bfloat16: up or down at random, right on average.

A weight of 0.02 has neighbours 1.2e-4 away in bfloat16. Rounded to the nearest, a step of 2e-5 leaves it as it is,
however often it is taken; rounded at random it moves the weight every sixth time (arXiv 2010.06192). The lower half of
a float32's bits is what bfloat16 leaves out: 16 random bits are added to it, and what they carry into the upper half
decides.

Random bits are a hash of seed, step, stream and position: nothing is stored, a run that goes on from a checkpoint draws
what it would have drawn, and every backend and every layout over devices draws the same.
"""

import math

from keras import ops

_LOWER_HALF = 0xFFFF
_UPPER_HALF = ~_LOWER_HALF
# murmur3's finalizer (Austin Appleby, public domain), and 2 ** 32 over the golden ratio, as signed integers.
_FACTORS = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)
_GOLDEN = 0x9E3779B9 - 2**32


def random_key(seed, step, stream):
    """An int32 scalar that differs with each of three integers.

    Args:
        seed: an int.
        step: an int, for which the key is one, too: no kernels are launched for it; or an integer scalar.
        stream: an int.
    """
    if isinstance(step, int):
        key = 0
        for part in (seed, step, stream):
            key = _mixed_int(((key + part) * _GOLDEN) % 2**32)
        return _signed(key)
    key = _int32(0)
    for part in (seed, step, stream):
        key = _mixed(ops.multiply(ops.add(key, ops.cast(part, "int32")), _int32(_GOLDEN)))
    return key


def random_bits(shape, key, start=0):
    """Integers from 0 to 65,535 for an array, int32, each as likely as any.

    Args:
        shape: of the array, of fewer than 2 ** 32 elements.
        key: see `random_key`.
        start: the place of its first element in a larger array, whose bits these are a part of.
    """
    place = _int32(_signed(start * _GOLDEN))
    for axis, size in enumerate(shape):
        # A vector an axis, not one range reshaped: a layout over devices divides it without moving anything.
        stride = _signed(math.prod(shape[axis + 1 :]) * _GOLDEN)
        along = ops.multiply(ops.arange(size, dtype="int32"), _int32(stride))
        place = ops.add(place, ops.reshape(along, [-1] + [1] * (len(shape) - axis - 1)))
    return ops.bitwise_and(_mixed(ops.bitwise_xor(place, key)), _int32(_LOWER_HALF))


def stochastic_round(values, bits):
    """Rounds to bfloat16, to a neighbour as likely as the value is near to it; what bfloat16 holds stays.

    Args:
        values: float32.
        bits: of `random_bits`, of the same shape.

    Returns:
        bfloat16. Infinities and NaN are themselves.
    """
    return ops.cast(_cut(values, bits), "bfloat16")


def nearest_bfloat16(values):
    """The nearest number that bfloat16 holds, ties to even, as float32.

    By the bits, because XLA takes a cast to bfloat16 and back for nothing.
    """
    last_bit = ops.bitwise_and(ops.right_shift(ops.view(values, "int32"), _int32(16)), _int32(1))
    half = ops.add(_int32(_LOWER_HALF // 2), last_bit)
    return _cut(values, half)


def _cut(values, bits):
    raised = ops.add(ops.view(values, "int32"), bits)
    cut = ops.view(ops.bitwise_and(raised, _int32(_UPPER_HALF)), "float32")
    return ops.where(ops.isfinite(values), cut, values)  # a NaN of ones all over would become zero


def _mixed(x):
    for shift, factor in zip((16, 13), _FACTORS, strict=True):
        x = ops.multiply(ops.bitwise_xor(x, _shifted(x, shift)), _int32(factor))
    return ops.bitwise_xor(x, _shifted(x, 16))


def _mixed_int(x):
    for shift, factor in zip((16, 13), _FACTORS, strict=True):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)


def _int32(value):
    """A constant. With a `floatx` of bfloat16, Keras on JAX takes a plain integer for a float32."""
    return ops.convert_to_tensor(value, "int32")


def _signed(x):
    return (x + 2**31) % 2**32 - 2**31


def _shifted(x, count):
    # A shift of a signed integer drags its sign along.
    return ops.bitwise_and(ops.right_shift(x, _int32(count)), _int32(2 ** (32 - count) - 1))
