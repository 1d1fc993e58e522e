"""From a stack's output to one vector per text: the mean of its tokens, or its last token."""

import keras
from keras import ops

from keras_t5gemma.suggestions import check_choice

POOLINGS = ("mean", "last")


def pooled(output, mask, pooling: str):
    """One vector per text, in float32.

    Args:
        output: [B, S, D]. Its values at padding do not matter, not even NaNs.
        mask: int [B, S], 0 at padding, which may be on either side.
        pooling: "mean" or "last".

    Returns:
        float32 [B, D]; zeros for a row of padding.
    """
    keep = mask != 0
    weights = ops.cast(keep, "float32")
    if pooling == "mean":
        weights = weights / ops.maximum(ops.sum(weights, axis=1, keepdims=True), 1.0)
    else:
        positions = ops.arange(1, ops.shape(mask)[1] + 1)
        positions = ops.where(keep, positions, 0)
        weights = weights * ops.cast(positions == ops.max(positions, axis=1, keepdims=True), "float32")
    # Not a product with the mask: the output at padding must not matter even if it is NaN.
    output = ops.where(ops.expand_dims(keep, 2), ops.cast(output, "float32"), 0.0)
    return ops.einsum("bs,bsd->bd", weights, output)


class Pooling(keras.layers.Layer):
    """Pools a stack's output, cuts the vectors to a width and normalizes them, all in float32.

    Args:
        pooling: "mean" or "last".
        normalize: whether vectors have length 1.
        dimensions: the width E of the vectors, the first numbers of the whole ones; None for all, E = D.
        **kwargs: as for `keras.layers.Layer`.

    Raises:
        ValueError: if `pooling` is unknown.
    """

    def __init__(self, pooling: str, normalize: bool = False, dimensions: int | None = None, **kwargs):
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        check_choice(pooling, "pooling", POOLINGS)
        self.pooling = pooling
        self.normalize = normalize
        self.dimensions = dimensions

    def call(self, output, mask):
        """[B, E] of the stack's output [B, S, D] and a mask [B, S]."""
        vectors = pooled(output, mask, self.pooling)[:, : self.dimensions]
        if not self.normalize:
            return vectors
        squares = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
        return vectors * ops.rsqrt(ops.maximum(squares, 1e-24))  # a vector of zeros stays one
