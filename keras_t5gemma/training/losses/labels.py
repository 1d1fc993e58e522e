"""Labels and their weights: -100 has weight 0, and a label of weight 0 may be any number."""

from collections.abc import Sequence

from keras import ops

# Hugging Face's collators and PyTorch's losses mark positions without a target by this label.
IGNORED_LABEL = -100


def labels_and_weights(labels, weights, shape: Sequence[int | None] | None = None):
    """Labels that are valid as indices, and their weights.

        labels       5  7  -100  900      weights  1  1  1  0
        becomes      5  7     0    0               1  1  0  0

    Args:
        labels: ids [B, T], any number type.
        weights: [B, T], [B] for one weight per row, or None for equal weights.
        shape: `(B, T)` of the model's positions, to compare with the labels' shape; None if unknown.

    Returns:
        `(labels, weights)`: int32 [B, T], 0 at weight 0; float32 [B, T], 0 at labels of -100.

    Raises:
        ValueError: if labels or weights have another shape, as far as shapes are known.
    """
    labels = ops.cast(labels, "int32")
    _check_shape("y", labels.shape, shape)
    if weights is None:
        weights = ops.ones_like(labels, dtype="float32")
    weights = ops.cast(weights, "float32")
    by_row = len(weights.shape) == 1 and len(labels.shape) == 2
    _check_shape("sample_weight", (*weights.shape, labels.shape[1]) if by_row else weights.shape, labels.shape)
    if by_row:
        weights = ops.broadcast_to(ops.expand_dims(weights, 1), ops.shape(labels))
    weights = ops.where(labels == IGNORED_LABEL, 0.0, weights)
    return ops.where(weights == 0, 0, labels), weights


def _check_shape(name: str, shape: Sequence[int | None], expected: Sequence[int | None] | None) -> None:
    """Raises a ValueError if labels or weights do not have the shape of the logits; None matches any size."""
    if expected is None:
        return
    shape, expected = tuple(shape), tuple(expected)
    matches = len(shape) == len(expected) and all(
        None in pair or pair[0] == pair[1] for pair in zip(shape, expected, strict=True)
    )
    if not matches:
        kind = "labels" if name == "y" else "weights"
        rows = " (or [B], one per row)" if name == "sample_weight" else ""
        raise ValueError(
            f"`{name}` must hold {kind} [B, T]{rows} for a decoder of B, T = {expected}. Received: shape {shape}."
        )
