"""Steps on JAX: functions of state and batch, as Keras has them. A batch in parts is one loop of XLA's."""

import functools

import jax
import keras
from keras import ops

from keras_t5gemma.training.steps.accumulation import joined_rows
from keras_t5gemma.training.steps.common import (
    added,
    batch_size,
    for_optimizer,
    outputs_and_loss,
    track_loss,
)
from keras_t5gemma.training.steps.comparison import loss_of_outputs, random_states, with_gradients
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
    gradients, loss, non_trainable, metrics = run(model, scope, forward, trainable, non_trainable, metrics, batch)
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
    groups = _groups(model, trainable, non_trainable, metrics)
    with keras.StatelessScope(state_mapping=[*scope, *_pairs(groups)], collect_losses=True) as after:
        y_pred, loss = outputs_and_loss(model, *batch, training=training)
        scaled = model.optimizer.scale_loss(loss) if training else loss
        # Metrics may have no derivatives.
        model.compute_metrics(*batch[:2], keras.tree.map_structure(jax.lax.stop_gradient, y_pred), batch[2])
    _, non_trainable, metrics = ([after.get_current_value(variable) for variable in group] for group, _ in groups)
    return scaled, (loss, non_trainable, metrics)


def _groups(model, trainable, non_trainable, metrics):
    """`[(variables, their values), ...]`."""
    return [
        (model.trainable_variables, trainable),
        (model.non_trainable_variables, non_trainable),
        (model.metrics_variables, metrics),
    ]


def _pairs(groups):
    """`[(variable, value), ...]`."""
    return [pair for variables, values in groups for pair in zip(variables, values, strict=True)]


def _whole(model, scope, forward, trainable, non_trainable, metrics, batch):  # noqa: ARG001 as `_in_parts`
    """`(gradients, loss, non_trainable, metrics)` of a batch at once."""
    (_, (loss, *updated)), gradients = jax.value_and_grad(forward, has_aux=True)(
        trainable, non_trainable, metrics, batch
    )
    return gradients, loss, *updated


def _in_parts(model, scope, forward, trainable, non_trainable, metrics, batch):
    """`_whole` of a batch in parts."""
    count, parts, shares = model.accumulation.cut(batch)
    if model.compares_rows:
        groups = _groups(model, trainable, non_trainable, metrics)
        parts, shares, metrics = _run_once(model, scope, groups, count, parts, batch)

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


def _run_once(model, scope, groups, count, parts, batch):
    """Runs the parts of a batch whose rows are compared for the first time.

    Args:
        model: the model.
        scope: as for `_forward`.
        groups: as `_groups` returns them.
        count: n.
        parts: `(x, y, sample_weight)`, cut.
        batch: the same of all rows.

    Returns:
        `(parts, shares, metrics)`: the first two for the second run.
    """
    _, y, sample_weight = batch
    states = random_states(model)
    values = [*scope, *_pairs(groups)]

    def outputs_of(drawn, x):
        # Values of random states are passed on from part to part, as in the second run.
        mapping = [*values, *zip(states, drawn, strict=True)]
        with keras.StatelessScope(state_mapping=mapping) as after:
            outputs = model.outputs_of(x, training=True)
        return [after.get_current_value(state) for state in states], outputs

    with keras.StatelessScope(state_mapping=values) as before:
        drawn = [before.get_current_value(state) for state in states]
    _, outputs = jax.lax.scan(outputs_of, drawn, parts[0])

    def loss_of(outputs):
        with keras.StatelessScope(state_mapping=values) as after:
            loss = loss_of_outputs(model, outputs, y, sample_weight)
        return loss, [after.get_current_value(variable) for variable in groups[2][0]]

    gradients, metrics = jax.grad(loss_of, has_aux=True)(joined_rows(outputs))
    return *with_gradients(parts, count, gradients), metrics


def _logs(model, metrics, loss, batch):
    """`(logs, metrics)` after a step."""
    with keras.StatelessScope(zip(model.metrics_variables, metrics, strict=True)) as after:
        track_loss(model, loss, batch_size(batch))
        logs = model.get_metrics_result()
    return logs, [after.get_current_value(variable) for variable in model.metrics_variables]
