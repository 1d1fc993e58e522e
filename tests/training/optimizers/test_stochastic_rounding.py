"""Rounding to bfloat16 at random: right on average, exact for what bfloat16 holds."""

import ml_dtypes
import numpy as np
from keras import ops

from keras_t5gemma.training.optimizers.stochastic_rounding import (
    nearest_bfloat16,
    random_bits,
    random_key,
    stochastic_round,
)

VALUES = np.random.default_rng(0).normal(size=1000).astype("float32") * np.float32(0.02)


def rounded(values, step=0):
    bits = random_bits(values.shape, random_key(3, step, 5))
    return np.asarray(ops.convert_to_numpy(ops.cast(stochastic_round(ops.convert_to_tensor(values), bits), "float32")))


def test_mean_of_many_roundings_is_the_value():
    each = np.stack([rounded(VALUES, step) for step in range(400)])
    unit = 2.0 ** (np.floor(np.log2(np.abs(VALUES))) - 7)
    assert set(np.unique(np.abs(each - VALUES) < unit)) == {True}
    # A rounding's deviation is half a unit at most; the mean of 400 has a twentieth of it.
    error = (each.mean(axis=0, dtype="float64") - VALUES) / unit
    assert np.abs(error).max() < 5 * 0.5 / 20
    assert abs(error.mean()) < 4 * 0.5 / 20 / len(VALUES) ** 0.5


def test_what_bfloat16_holds_stays():
    held = np.concatenate([VALUES.astype(ml_dtypes.bfloat16).astype("float32"), [0.0, -0.0, np.inf, -np.inf]])
    np.testing.assert_array_equal(rounded(held.astype("float32")), held)
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], "uint32").view("float32")
    assert np.isnan(rounded(odd)).all()


def test_nearest_is_that_of_a_cast():
    halves = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # ties
    values = np.concatenate([VALUES, halves])
    found = ops.convert_to_numpy(nearest_bfloat16(ops.convert_to_tensor(values)))
    np.testing.assert_array_equal(found, values.astype(ml_dtypes.bfloat16).astype("float32"))


def test_bits_are_the_same_however_they_are_asked_for():
    whole = ops.convert_to_numpy(random_bits((3, 5, 7), random_key(1, 2, 3)))
    assert whole.ravel()[:4].tolist() == [46249, 37094, 23456, 48024]  # on every backend
    key = random_key(1, ops.convert_to_tensor(2, "int32"), 3)
    np.testing.assert_array_equal(ops.convert_to_numpy(random_bits((3, 5, 7), key)), whole)
    part = ops.convert_to_numpy(random_bits((20,), random_key(1, 2, 3), start=30))
    np.testing.assert_array_equal(part, whole.ravel()[30:50])


def test_bits_differ_with_seed_step_and_stream_and_are_even():
    many = [
        ops.convert_to_numpy(random_bits((64, 64), random_key(*key)))
        for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    for i, bits in enumerate(many):
        assert bits.min() >= 0
        assert bits.max() < 2**16
        for k in range(16):
            assert abs((bits >> k & 1).mean() - 0.5) < 5 * 0.5 / 64
        for other in many[:i]:
            assert abs(np.corrcoef(bits.ravel(), other.ravel())[0, 1]) < 5 / 64
