"""Batches in a traced `tf.data` pipeline: the same numpy code as elsewhere, as one operation of the graph."""

import sys
from collections.abc import Mapping

import keras

from keras_t5gemma.training.batches.arrays import INPUT_NAMES, LABELS, BatchArrays, renamed
from keras_t5gemma.training.losses.labels import IGNORED_LABEL


def in_graph(arrays: BatchArrays, x: Mapping, y, sample_weight) -> tuple:
    """`arrays(x, y, sample_weight)` for symbolic tensors too, whose values are known only when a graph runs.

    Args:
        arrays: a `BatchArrays`.
        x: a mapping with token ids.
        y: labels, a dict with them, or None.
        sample_weight: weights, or None.

    Returns:
        The result of `arrays`. In a graph its errors are raised as TensorFlow's `InvalidArgumentError`, with the same
        message.
    """
    # Symbolic tensors exist only if TensorFlow is loaded already: it is never imported from here.
    tf = sys.modules.get("tensorflow")
    if tf is None or not any(map(_is_symbolic, keras.tree.flatten((dict(x), y, sample_weight)))):
        return arrays(x, y, sample_weight)
    columns, rest = renamed(x), None
    if isinstance(y, Mapping):
        y, rest = y.get(LABELS), y
    if arrays.any_targets and y is not None and (y.shape.rank != 2 or not y.dtype.is_integer):
        return x, y if rest is None else rest, sample_weight  # targets of the user's own loss
    columns |= ({} if y is None else {"y": y}) | ({} if sample_weight is None else {"w": sample_weight})
    columns = {name: _dense(tf, name, value) for name, value in columns.items()}
    names, tensors = list(columns), list(columns.values())

    def run(*values):
        values = dict(zip(names, values, strict=True))
        x, y, weights = arrays(
            {name: value for name, value in values.items() if name not in ("y", "w")}, values.get("y"), values.get("w")
        )
        return *(x[name] for name in INPUT_NAMES), y, weights

    *inputs, labels, weights = tf.numpy_function(run, tensors, [tf.int32] * 5 + [tf.float32], stateful=False)
    decoder = next(columns[name].shape for name in ("decoder_token_ids", "y", LABELS) if name in columns)
    encoder = columns["encoder_token_ids"].shape
    rows = [None] if arrays.multiple > 1 else encoder[:1]
    for tensor, shape in zip((*inputs, labels, weights), [encoder] * 2 + [decoder] * 4, strict=True):
        tensor.set_shape(tf.TensorShape(rows).concatenate(shape[1:]))
    return dict(zip(INPUT_NAMES, inputs, strict=True)), labels if rest is None else {**rest, LABELS: labels}, weights


def _is_symbolic(value) -> bool:
    """Whether a value is a tensor of a TensorFlow graph; TensorFlow must be loaded."""
    tf = sys.modules["tensorflow"]
    return tf.is_symbolic_tensor(value.flat_values if isinstance(value, tf.RaggedTensor) else value)


def _dense(tf, name: str, value):
    """A tensor; ragged rows are padded, labels with `IGNORED_LABEL`."""
    if isinstance(value, tf.RaggedTensor):
        return value.to_tensor(tf.cast(IGNORED_LABEL if name in ("y", LABELS) else 0, value.dtype))
    return tf.convert_to_tensor(value)
