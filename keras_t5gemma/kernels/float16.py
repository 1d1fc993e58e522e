"""Staying within float16's range."""

import keras
from keras import ops

_FLOAT16_MAX = 65504.0  # numpy.finfo("float16").max


def finite(x):
    """x, in float16 held within its largest numbers: beyond them it would be infinite, and NaN after the next norm."""
    if keras.backend.standardize_dtype(x.dtype) != "float16":
        return x
    return ops.clip(x, -_FLOAT16_MAX, _FLOAT16_MAX)
