"""Clips values to the range of float16."""

import keras
from keras import ops

_FLOAT16_MAX = 65504.0  # numpy.finfo("float16").max


def clip_to_range(x):
    """Clips x to the largest finite numbers if it is float16. Beyond them it is infinite, and NaN after a norm."""
    if keras.backend.standardize_dtype(x.dtype) != "float16":
        return x
    return ops.clip(x, -_FLOAT16_MAX, _FLOAT16_MAX)
