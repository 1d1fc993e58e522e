"""Steps on PyTorch. A batch in parts is one part after another."""

import keras
import torch

from keras_t5gemma.training.steps.common import (
    evaluation_step,
    for_optimizer,
    logs_of,
    outputs_and_loss,
    part,
    without_moving,
)

STEPS_ARE_FUNCTIONS = False
test_step = evaluation_step


def train_step(model, data):
    """The logs of a batch, after an update of the weights."""
    data = keras.utils.unpack_x_y_sample_weight(data)
    model.zero_grad()
    variables = model.trainable_variables
    gradients, loss = (_whole if model.accumulation.steps == 1 else _in_parts)(model, data, variables)
    with torch.no_grad():
        without_moving(model, lambda: model.optimizer.apply(gradients, variables))
    # Keras keeps them until the next forward pass is over.
    model.zero_grad()
    return logs_of(model, loss, data)


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
