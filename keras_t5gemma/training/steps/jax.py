"""Steps on JAX: functions of state and batch, as Keras has them. A batch in parts is one loop of XLA's."""

import functools

import jax
import keras
from keras import ops

from keras_t5gemma.training.steps.common import added, batch_size, for_optimizer, outputs_and_loss, track_loss
from keras_t5gemma.training.steps.model import unpacked

# Variables that are not arguments of a step would be constants of its program.
STEPS_ARE_FUNCTIONS = True


def train_step(model, state, data):
    """One step of `fit`.

    Args:
        model: a model with `OwnSteps`.
        state: `(trainable, non_trainable, optimizer, metrics)`, lists of the variables' values.
        data: a batch, or a `TaughtBatch`.

    Returns:
        `(logs, state)`.
    """
    trainable, non_trainable, optimizer_variables, metrics = state
    batch, teacher = unpacked(model, data)
    scope = [*teacher, *zip(model.optimizer.variables, optimizer_variables, strict=True)]
    forward = functools.partial(_forward, model, scope, training=True)
    run = _whole if model.accumulation.steps == 1 else _in_parts
    gradients, loss, non_trainable, metrics = run(model, forward, trainable, non_trainable, metrics, batch)
    before = trainable
    trainable, optimizer_variables = model.optimizer.stateless_apply(optimizer_variables, gradients, trainable)
    trainable = [
        old if model.is_frozen_during_fit(variable) else new
        for variable, old, new in zip(model.trainable_variables, before, trainable, strict=True)
    ]
    logs, metrics = _logs(model, metrics, loss, batch)
    return logs, (trainable, non_trainable, optimizer_variables, metrics)


def test_step(model, state, data):
    """One step of `evaluate`; `(logs, state)`, whose state is `(trainable, non_trainable, metrics)`."""
    trainable, non_trainable, metrics = state
    batch, teacher = unpacked(model, data)
    _, (loss, non_trainable, metrics) = _forward(
        model, teacher, trainable, non_trainable, metrics, batch, training=False
    )
    logs, metrics = _logs(model, metrics, loss, batch)
    return logs, (trainable, non_trainable, metrics)


def _forward(model, scope, trainable, non_trainable, metrics, batch, *, training):
    """A forward pass as a function of the variables' values.

    Args:
        model: the model.
        scope: values of variables that are not the model's, `[(variable, value), ...]`.
        trainable: its trainable variables' values.
        non_trainable: those of the others.
        metrics: those of its metrics.
        batch: `(x, y, sample_weight)`.
        training: whether gradients will be asked for.

    Returns:
        `(scaled loss, (loss, non_trainable, metrics))`: what to differentiate, and what else there is afterwards.
    """
    groups = (
        (model.trainable_variables, trainable),
        (model.non_trainable_variables, non_trainable),
        (model.metrics_variables, metrics),
    )
    values = [pair for variables, given in groups for pair in zip(variables, given, strict=True)]
    with keras.StatelessScope(state_mapping=[*scope, *values], collect_losses=True) as after:
        y_pred, loss = outputs_and_loss(model, *batch, training=training)
        scaled = model.optimizer.scale_loss(loss) if training else loss
        # Metrics may have no derivatives.
        model.compute_metrics(*batch[:2], keras.tree.map_structure(jax.lax.stop_gradient, y_pred), batch[2])
    _, non_trainable, metrics = ([after.get_current_value(variable) for variable in group] for group, _ in groups)
    return scaled, (loss, non_trainable, metrics)


def _whole(model, forward, trainable, non_trainable, metrics, batch):  # noqa: ARG001 as `_in_parts`
    """`(gradients, loss, non_trainable, metrics)` of a batch at once."""
    (_, (loss, *updated)), gradients = jax.value_and_grad(forward, has_aux=True)(
        trainable, non_trainable, metrics, batch
    )
    return gradients, loss, *updated


def _in_parts(model, forward, trainable, non_trainable, metrics, batch):
    """`_whole` of a batch in parts."""
    _, parts, shares = model.accumulation.cut(batch)

    def loss_of(trainable, non_trainable, metrics, part, share):
        loss, results = forward(trainable, non_trainable, metrics, part)
        return loss * share, results

    def body(carry, part_and_share):
        gradients, total, non_trainable, metrics = carry
        part, share = part_and_share
        (_, (loss, non_trainable, metrics)), more = jax.value_and_grad(loss_of, has_aux=True)(
            trainable, non_trainable, metrics, part, share
        )
        return (added(gradients, more), total + loss * share, non_trainable, metrics), None

    # A loop, not a sequence of steps: XLA might run the forward passes of all parts first.
    start = ([ops.zeros_like(value, "float32") for value in trainable], ops.zeros(()), non_trainable, metrics)
    (gradients, loss, non_trainable, metrics), _ = jax.lax.scan(body, start, (parts, shares))
    return for_optimizer(model, gradients, [value.dtype for value in trainable]), loss, non_trainable, metrics


def _logs(model, metrics, loss, batch):
    """`(logs, metrics)` after a step."""
    with keras.StatelessScope(zip(model.metrics_variables, metrics, strict=True)) as after:
        track_loss(model, loss, batch_size(batch))
        logs = model.get_metrics_result()
    return logs, [after.get_current_value(variable) for variable in model.metrics_variables]
