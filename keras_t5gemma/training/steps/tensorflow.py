"""The training step of a batch in parts on TensorFlow: one loop of the graph's."""

import tensorflow as tf

from keras_t5gemma.kernels.device import replicas
from keras_t5gemma.training.steps.accumulation import added, batch_size, for_optimizer, part, report


def train_step(accumulation, model, data):
    """The logs of a batch."""
    count, parts, shares = accumulation.cut(data)
    variables = model.trainable_variables

    def body(i, total, gradients):
        x, y, sample_weight = part(parts, i)
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            loss = model.compute_loss(x, y, y_pred, sample_weight, training=True) * shares[i]
            scaled = model.optimizer.scale_loss(loss)
        more = tape.gradient(scaled, variables)
        model.compute_metrics(x, y, y_pred, sample_weight)
        return i + 1, total + loss, added(gradients, more)

    # A loop, not a sequence of steps: they would run side by side. One part at a time, for the memory of one.
    start = [tf.zeros(variable.shape) for variable in variables]
    _, loss, gradients = tf.while_loop(
        lambda i, *_: i < count, body, (tf.constant(0), tf.constant(0.0), start), parallel_iterations=1
    )
    gradients = for_optimizer(model, gradients, [variable.dtype for variable in variables])
    model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return report(model, loss * replicas(), batch_size(data))
