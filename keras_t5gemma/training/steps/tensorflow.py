"""Steps on TensorFlow. A batch in parts is one loop of the graph's."""

import keras
import tensorflow as tf

from keras_t5gemma.training.steps.accumulation import joined_rows
from keras_t5gemma.training.steps.common import (
    added,
    evaluation_step,
    for_optimizer,
    logs_of,
    outputs_and_loss,
    part,
    without_moving,
)
from keras_t5gemma.training.steps.comparison import loss_of_outputs, random_states, with_gradients

STEPS_ARE_FUNCTIONS = False
test_step = evaluation_step


def train_step(model, data):
    """The logs of a batch, after an update of the weights."""
    data = keras.utils.unpack_x_y_sample_weight(data)
    variables = model.trainable_variables
    gradients, loss = (_whole if model.accumulation.steps == 1 else _in_parts)(model, data, variables)
    without_moving(model, lambda: model.optimizer.apply_gradients(zip(gradients, variables, strict=True)))
    return logs_of(model, loss, data)


def _whole(model, data, variables):
    """`(gradients, loss)` of a batch at once."""
    x, y, sample_weight = data
    with tf.GradientTape() as tape:
        y_pred, loss = outputs_and_loss(model, *data, training=True)
        scaled = model.optimizer.scale_loss(loss)
    model.compute_metrics(x, y, y_pred, sample_weight)
    return tape.gradient(scaled, variables), loss


def _in_parts(model, data, variables):
    """`_whole` of a batch in parts."""
    count, parts, shares = model.accumulation.cut(data)
    if model.compares_rows:
        parts, shares = _run_once(model, count, parts, data)

    def body(i, total, gradients):
        x, y, sample_weight = part(parts, i)
        with tf.GradientTape() as tape:
            y_pred, loss = outputs_and_loss(model, x, y, sample_weight, training=True)
            loss = loss * shares[i]
            scaled = model.optimizer.scale_loss(loss)
        more = tape.gradient(scaled, variables)
        model.compute_metrics(x, y, y_pred, sample_weight)
        return i + 1, total + loss, added(gradients, more)

    # A loop, not a sequence of steps: they would run side by side. One part at a time, for the memory of one.
    start = [tf.zeros(variable.shape) for variable in variables]
    _, loss, gradients = tf.while_loop(
        lambda i, *_: i < count, body, (tf.constant(0), tf.constant(0.0), start), parallel_iterations=1
    )
    return for_optimizer(model, gradients, [variable.dtype for variable in variables]), loss


def _run_once(model, count, parts, data):
    """Runs the parts of a batch whose rows are compared for the first time; `(parts, shares)` for the second."""
    _, y, sample_weight = data
    states = random_states(model)
    before = [tf.identity(state) for state in states]
    outputs = tf.map_fn(
        lambda x: model.outputs_of(x, training=True), parts[0], fn_output_signature=tf.float32, parallel_iterations=1
    )
    for state, value in zip(states, before, strict=True):
        state.assign(value)
    outputs = joined_rows(outputs)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        loss = loss_of_outputs(model, outputs, y, sample_weight)
    return with_gradients(parts, count, tape.gradient(loss, outputs))
