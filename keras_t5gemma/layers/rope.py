"""Rotary position embeddings (RoPE, arXiv 2104.09864)."""

import numpy as np
from keras import ops

from keras_t5gemma.kernels.cache_update import is_per_row


def rotary_angles(length, start, head_dim: int, wavelength: float):
    """Cosines and sines of RoPE for consecutive positions.

    Args:
        length: T, the number of positions.
        start: the first position; an int, or in a decoding step a scalar tensor, or a tensor [B] of one per row.
        head_dim: H.
        wavelength: the base of the frequencies, 10,000 in Gemma 2.

    Returns:
        A pair of float32 [T, 1, H / 2], or [B, T, 1, H / 2] for a start per row, ready to multiply
        [B, T, heads, H / 2].
    """
    frequencies = wavelength ** -(np.arange(0, head_dim, 2, dtype="float32") / head_dim)
    start = ops.expand_dims(start, 1) if is_per_row(start) else start
    positions = ops.cast(ops.add(ops.arange(length, dtype="int32"), start), "float32")
    angles = ops.expand_dims(positions, (-2, -1)) * ops.convert_to_tensor(frequencies, dtype="float32")
    return ops.cos(angles), ops.sin(angles)


def rotate(x, angles):
    """Rotates the halves of each head of x [B, T, heads, H] by `rotary_angles`, in float32."""
    cos, sin = angles
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    rotated = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return ops.cast(rotated, x.dtype)
