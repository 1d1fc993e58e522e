"""Gradient accumulation within a step: the batch runs in parts, and the step is that of the whole batch.

Keras's `gradient_accumulation_steps` is the plain mean over batches, even if they have different numbers of target
tokens, and keeps its sums from step to step. Here a part's loss counts by its share of the whole batch's weight, which
is known beforehand. The optimizer sees one gradient per batch, so clipping, schedules, counts of steps and checkpoints
are those of a whole batch.

A loss that compares rows with each other is no mean over parts. If the model `compares_rows`, a step first computes the
outputs of all parts, keeps nothing else of them, and takes the gradient of the loss with respect to these outputs. Then
each part runs again, and goes backward from its share of this gradient (GradCache, arXiv 2101.06983). The gradient of
the weights is that of the whole batch. Random numbers, such as dropout's, are the same in both runs.
"""

import keras
from keras import ops

from keras_t5gemma.checks import integer
from keras_t5gemma.training.losses.labels import labels_and_weights
from keras_t5gemma.training.steps.common import batch_size

# What a loss divides its sum by, and so what a part's share is: of the weights, of the elements, or all of it.
_BY_WEIGHT, _BY_ELEMENTS, _SUM = ("mean_with_sample_weight",), ("sum_over_batch_size", "mean"), ("sum",)


class Accumulation:
    """How a model's training step runs a batch in parts.

    Each part takes every n-th row, so that rows which lie spread over devices stay where they are. A batch whose rows
    do not divide by the number of parts is cut into the next larger number that they divide by, which changes nothing
    but time: parts are of equal size, and none is larger than asked for.

    Args:
        steps: parts of a batch, n.
        loss: what the model is compiled with; its `reduction` says how the losses of parts add up.

    Raises:
        ValueError: if `steps` is not a positive integer, or it is more than one and `loss` is not a single loss
            that sums or averages.
    """

    def __init__(self, steps, loss):
        self.steps = steps = integer(steps, "accumulation_steps")
        self._reduction = _reduction(loss)
        self._labels_of = getattr(loss, "labels_of", None)
        if steps > 1 and self._reduction not in _BY_WEIGHT + _BY_ELEMENTS + _SUM:
            raise ValueError(
                f"accumulation_steps={steps} needs a single loss, to know what the losses of parts add up to, with a "
                f"`reduction` of {', '.join(map(repr, _BY_WEIGHT + _BY_ELEMENTS + _SUM))}. Received: loss={loss!r} "
                f"with the reduction {self._reduction!r}."
            )

    def cut(self, data):
        """A batch in parts.

        Args:
            data: `(x, y, sample_weight)` as `fit` gives them, nested as they may be, of B rows.

        Returns:
            `(count, parts, shares)`: n; `(x, y, sample_weight)` whose arrays are [n, B / n, ...]; float32 [n], what the
            loss of each part is to be multiplied by.
        """
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        if self._labels_of and self._reduction in _BY_WEIGHT:
            # The weights that the loss will use, which are 0 at labels of -100.
            _, weights = labels_and_weights(self._labels_of(y), weights)
        data = x, y, weights
        rows = batch_size(data)
        count = self._count(rows)

        parts = keras.tree.map_structure(lambda x: None if x is None else cut_rows(x, count), data)
        weights = parts[2]
        if self._reduction in _SUM:
            shares = ops.ones((count,), "float32")
        elif self._reduction in _BY_ELEMENTS or weights is None:
            shares = ops.ones((count,), "float32") / ops.cast(count, "float32")
        else:
            weights = ops.sum(ops.reshape(ops.cast(weights, "float32"), (count, -1)), axis=1)
            shares = ops.divide_no_nan(weights, ops.sum(weights))
        return count, parts, shares

    def _count(self, rows):
        """The smallest divisor of the rows that is no less than `steps`; as many as rows where there are fewer."""
        if isinstance(rows, int):
            return next(count for count in range(min(self.steps, rows), rows + 1) if rows % count == 0)
        # TensorFlow traces a step for any number of rows.
        import tensorflow as tf

        counts = tf.range(tf.minimum(self.steps, rows), rows + 1)
        return tf.reduce_min(tf.boolean_mask(counts, rows % counts == 0))


def cut_rows(x, count):
    """An array [B, ...] in parts [n, B / n, ...], each with every n-th row."""
    shape = ops.shape(x)
    return ops.swapaxes(ops.reshape(x, (shape[0] // count, count, *shape[1:])), 0, 1)


def joined_rows(x):
    """Parts [n, B / n, ...] as the array [B, ...] that `cut_rows` cut."""
    shape = ops.shape(x)
    return ops.reshape(ops.swapaxes(x, 0, 1), (shape[0] * shape[1], *shape[2:]))


def _reduction(loss):
    if loss is None or keras.tree.is_nested(loss):
        return None
    # Keras wraps plain functions in a loss that averages.
    return getattr(keras.losses.get(loss), "reduction", _BY_ELEMENTS[0])
