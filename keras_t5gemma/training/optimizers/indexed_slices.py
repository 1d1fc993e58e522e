"""TensorFlow's gradients of embedding lookups, `tf.IndexedSlices`: rows of a table, with ids that may repeat."""

import keras


def is_distributed() -> bool:
    """Whether a `tf.distribute` strategy is active; False on the other backends."""
    if keras.config.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.has_strategy()


def without_duplicates(grad):
    """Sums the rows of a lookup's gradient that have the same id; other gradients are returned unchanged.

    TensorFlow's norm would count the rows of a repeated id separately. The number of rows stays the same, so that XLA
    compiles once; the rows left over are zero and have id 0.
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
    """A gradient in float32, with one row per id if it is a lookup's. For every backend."""
    grad = keras.ops.cast(grad, "float32")
    return without_duplicates(grad) if keras.config.backend() == "tensorflow" else grad


def dense(grad):
    """A gradient as one dense tensor. For every backend."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(grad)
    return grad
