"""The training step of a batch in parts on PyTorch: one part after another."""

import torch

from keras_t5gemma.training.steps.accumulation import batch_size, for_optimizer, part, report


def train_step(accumulation, model, data):
    """The logs of a batch."""
    count, parts, shares = accumulation.cut(data)
    model.zero_grad()
    variables = model.trainable_variables
    tensors = [variable.value for variable in variables]
    total, sums = 0.0, {}
    for i in range(count):
        x, y, sample_weight = part(parts, i)
        y_pred = model(x, training=True)
        loss = model.compute_loss(x, y, y_pred, sample_weight, training=True) * shares[i]
        model.optimizer.scale_loss(loss).backward()
        total = total + loss.detach()
        model.compute_metrics(x, y, y_pred, sample_weight)
        for k, tensor in enumerate(tensors):
            # PyTorch adds in place, in the dtype of the weight.
            if tensor.dtype != torch.float32 and tensor.grad is not None:
                sums[k] = sums.get(k, 0) + tensor.grad.float()
                tensor.grad = None
    gradients = [sums.get(k, tensor.grad) for k, tensor in enumerate(tensors)]
    gradients = for_optimizer(model, gradients, [variable.dtype for variable in variables])
    with torch.no_grad():
        model.optimizer.apply(gradients, variables)
    return report(model, total, batch_size(data))
