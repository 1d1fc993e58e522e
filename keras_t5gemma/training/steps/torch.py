"""Steps on PyTorch. A batch in parts is one part after another."""

import keras
import torch
from keras import ops

from keras_t5gemma.training.steps.accumulation import joined_rows
from keras_t5gemma.training.steps.common import (
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
    _forget_gradients(variables)
    gradients, loss = (_whole if model.accumulation.steps == 1 else _in_parts)(model, data, variables)
    with torch.no_grad():
        without_moving(model, lambda: model.optimizer.apply(gradients, variables))
    # Keras keeps them until the next forward pass is over.
    _forget_gradients(variables)
    return logs_of(model, loss, data)


def _forget_gradients(variables):
    """Removes the gradients of variables.

    `Module.zero_grad` misses those of LoRA's matrices if the model itself is never called, only its stacks: Keras
    tells PyTorch of new variables within such a call.
    """
    for variable in variables:
        variable.value.grad = None


def _whole(model, data, variables):
    """`(gradients, loss)` of a batch at once."""
    x, y, sample_weight = data
    y_pred, loss = outputs_and_loss(model, *data, training=True)
    model.optimizer.scale_loss(loss).backward()
    model.compute_metrics(x, y, y_pred, sample_weight)
    return [variable.value.grad for variable in variables], loss.detach()


def _in_parts(model, data, variables):
    """`_whole` of a batch in parts."""
    count, parts, shares = model.accumulation.cut(data)
    if model.compares_rows:
        parts, shares = _run_once(model, count, parts, data)
    tensors = [variable.value for variable in variables]
    total, sums = 0.0, {}
    for i in range(count):
        x, y, sample_weight = part(parts, i)
        y_pred, loss = outputs_and_loss(model, x, y, sample_weight, training=True)
        loss = loss * shares[i]
        model.optimizer.scale_loss(loss).backward()
        total = total + loss.detach()
        model.compute_metrics(x, y, y_pred, sample_weight)
        for k, tensor in enumerate(tensors):
            # PyTorch adds in place, in the dtype of the weight.
            if tensor.dtype != torch.float32 and tensor.grad is not None:
                sums[k] = sums.get(k, 0) + tensor.grad.float()
                tensor.grad = None
    gradients = [sums.get(k, tensor.grad) for k, tensor in enumerate(tensors)]
    return for_optimizer(model, gradients, [variable.dtype for variable in variables]), total


def _run_once(model, count, parts, data):
    """Runs the parts of a batch whose rows are compared for the first time; `(parts, shares)` for the second."""
    _, y, sample_weight = data
    states = random_states(model)
    before = [ops.copy(state) for state in states]
    # Keras's dropout without a seed draws from PyTorch's own generator.
    device = model.trainable_variables[0].value.device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        outputs = torch.stack([model.outputs_of(part(parts, i)[0], training=True) for i in range(count)])
        for state, value in zip(states, before, strict=True):
            state.assign(value)
    outputs = joined_rows(outputs).requires_grad_()
    (gradients,) = torch.autograd.grad(loss_of_outputs(model, outputs, y, sample_weight), outputs)
    return with_gradients(parts, count, gradients)
