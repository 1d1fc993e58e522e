"""The training step of a batch in parts on JAX: one loop of XLA's."""

import jax
import keras
from keras import ops

from keras_t5gemma.training.steps.accumulation import added, batch_size, for_optimizer, report


def train_step(accumulation, model, state, data):
    """`(logs, state)` of Keras's `(state, data)`."""
    trainable, non_trainable, optimizer_variables, metrics = state
    _, parts, shares = accumulation.cut(data)

    def loss_of(trainable, non_trainable, metrics, part, share):
        loss, results = model.compute_loss_and_updates(
            trainable, non_trainable, metrics, *part, training=True, optimizer_variables=optimizer_variables
        )
        return loss * share, results

    def body(carry, part_and_share):
        gradients, total, non_trainable, metrics = carry
        part, share = part_and_share
        (_, (loss, y_pred, non_trainable, metrics)), more = jax.value_and_grad(loss_of, has_aux=True)(
            trainable, non_trainable, metrics, part, share
        )
        with _metrics_of(model, metrics) as scope:
            model.compute_metrics(*part[:2], y_pred, part[2])
        metrics = [scope.get_current_value(variable) for variable in model.metrics_variables]
        return (added(gradients, more), total + loss * share, non_trainable, metrics), None

    # A loop, not a sequence of steps: XLA might run the forward passes of all parts first.
    start = ([ops.zeros_like(value, "float32") for value in trainable], ops.zeros(()), non_trainable, metrics)
    (gradients, loss, non_trainable, metrics), _ = jax.lax.scan(body, start, (parts, shares))
    gradients = for_optimizer(model, gradients, [value.dtype for value in trainable])
    trainable, optimizer_variables = model.optimizer.stateless_apply(optimizer_variables, gradients, trainable)
    with _metrics_of(model, metrics) as scope:
        logs = report(model, loss, batch_size(data))
    metrics = [scope.get_current_value(variable) for variable in model.metrics_variables]
    return logs, (trainable, non_trainable, optimizer_variables, metrics)


def _metrics_of(model, values):
    return keras.StatelessScope(zip(model.metrics_variables, values, strict=True))
