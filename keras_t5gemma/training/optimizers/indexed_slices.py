"""TensorFlow's gradients of lookups, `tf.IndexedSlices`: rows of a table, with ids that may repeat."""

import keras


def is_distributed():
    """Whether a `tf.distribute` strategy is at work; False on the other backends."""
    if keras.config.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.has_strategy()


def without_duplicates(grad):
    """A lookup's gradient with one row an id: TensorFlow's norm would take the rows of a repeated id one by one.

    The rows stay as many, so that XLA compiles once; those left over are zero, and said to be id 0's.
    """
    import tensorflow as tf

    if not isinstance(grad, tf.IndexedSlices):
        return grad
    count = tf.size(grad.indices)
    ids, rows = tf.unique(grad.indices)
    return tf.IndexedSlices(
        tf.math.unsorted_segment_sum(grad.values, rows, count),
        tf.pad(ids, [[0, count - tf.size(ids)]]),
        grad.dense_shape,
    )


def float32_gradient(grad):
    """A gradient in float32, with one row an id if it is of a lookup. On every backend."""
    grad = keras.ops.cast(grad, "float32")
    return without_duplicates(grad) if keras.config.backend() == "tensorflow" else grad


def dense(grad):
    """A gradient as one tensor. On every backend."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(grad)
    return grad
