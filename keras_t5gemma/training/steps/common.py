"""What the steps of all backends share."""

import keras
from keras import ops

from keras_t5gemma.kernels.device import replicas
from keras_t5gemma.training.optimizers.low_precision import LowPrecision


def outputs_and_loss(model, x, y, sample_weight, training):
    """One forward pass.

    Returns:
        `(y_pred, loss)`: the model's outputs, or None if the loss does without logits; and the loss, a scalar.
    """
    y_pred = None if model.trains_without_logits else model(x, training=training)
    loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
    if model.keeps_own_loss:
        model.track_own_loss(loss)
    return y_pred, loss


def track_loss(model, loss, rows):
    """Updates Keras's mean of the losses of batches, unless the model keeps a mean of its own."""
    if not model.keeps_own_loss:
        (tracker,) = (metric for metric in model.metrics if metric.name == "loss")
        tracker.update_state(loss, sample_weight=rows)


def logs_of(model, loss, data):
    """The logs after a step whose loss is of all rows of the batch `data`."""
    track_loss(model, loss * replicas(), batch_size(data))
    return model.get_metrics_result()


def evaluation_step(model, data):
    """The `test_step` of backends whose variables have their values while a step runs: the logs of a batch."""
    x, y, sample_weight = data = keras.utils.unpack_x_y_sample_weight(data)
    y_pred, loss = outputs_and_loss(model, *data, training=False)
    model.compute_metrics(x, y, y_pred, sample_weight)
    return logs_of(model, loss, data)


def batch_size(data):
    """Rows of a batch; an int if known when the step is traced."""
    return ops.shape(next(x for x in keras.tree.flatten(data) if x is not None))[0]


def part(parts, i):
    """Part i of the parts of a batch."""
    return keras.tree.map_structure(lambda x: None if x is None else x[i], parts)


def for_optimizer(model, gradients, dtypes):
    """Gradients in float32 for this package's optimizers, and in the dtypes of the weights for others."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if isinstance(optimizer, LowPrecision):
        return gradients
    return [
        gradient if gradient is None else ops.cast(gradient, dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]


def added(sums, gradients):
    """Float32 sums of gradients of any dtype, so that small ones are not lost in a large sum."""
    return [
        total if more is None else ops.add(total, ops.cast(more, "float32"))
        for total, more in zip(sums, gradients, strict=True)
    ]


def without_moving(model, apply):
    """Updates weights by `apply`, a function without arguments, after which the frozen ones are as they were."""
    frozen = [variable for variable in model.trainable_variables if model.is_frozen_during_fit(variable)]
    before = [ops.copy(variable) for variable in frozen]
    apply()
    for variable, value in zip(frozen, before, strict=True):
        variable.assign(value)
