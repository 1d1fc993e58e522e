"""Rotary position embeddings (RoPE, arXiv 2104.09864)."""

import numpy as np
from keras import ops


def rotary_angles(length, start, head_dim: int, wavelength: float):
    """Cosines and sines of RoPE for consecutive positions.

    Args:
        length: T, the number of positions.
        start: the first position; an int, or a scalar tensor in a decoding step.
        head_dim: H.
        wavelength: the base of the frequencies, 10,000 in Gemma 2.

    Returns:
        A pair of float32 [T, 1, H / 2], ready to multiply [B, T, heads, H / 2].
    """
    frequencies = wavelength ** -(np.arange(0, head_dim, 2, dtype="float32") / head_dim)
    positions = ops.cast(ops.add(ops.arange(length, dtype="int32"), start), "float32")
    angles = ops.reshape(positions, (-1, 1, 1)) * ops.convert_to_tensor(frequencies, dtype="float32")
    return ops.cos(angles), ops.sin(angles)


def rotate(x, angles):
    """Rotates the halves of each head of x [B, T, heads, H] by `rotary_angles`, in float32."""
    cos, sin = angles
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    rotated = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return ops.cast(rotated, x.dtype)
