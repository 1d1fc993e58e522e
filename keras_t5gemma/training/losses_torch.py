"""The chunked loss on PyTorch, in place: one buffer of logits becomes their gradients.

Through `keras.ops` each of a dozen steps would make a tensor of the logits' size, up to half a gigabyte that the
system has to find and clear; compiled backends make none. The oracle is `losses._sums_and_gradients`.
"""

import torch

from keras_t5gemma.layers.finite import finite
from keras_t5gemma.training.losses import chunk_targets

# Bytes of logits handled at once on a CPU: what its cache holds from one step to the next.
_BLOCK_BYTES = 2**22


def sums_and_gradients(settings, targets, x, table, train_table):
    """Loss and accuracy of all chunks, and the loss's gradients.

    Args:
        settings: a `losses.ChunkSettings`.
        targets: arrays [C, m, ...], such as labels and shares, and arrays that all chunks share.
        x: hidden states [C, m, D], in the compute dtype.
        table: the projection [V, D].
        train_table: whether its gradient is wanted.

    Returns:
        `(sums, x_gradient)` or `(sums, x_gradient, table_gradient)`, float32 [2], [C, m, D] and [V, D].
    """
    x = finite(x)
    compute, vocabulary_size = table.to(x.dtype), table.shape[0]
    count, tokens, width = x.shape
    sums = torch.zeros(2, dtype=torch.float32, device=x.device)
    x_gradient = torch.empty((count, tokens, width), dtype=torch.float32, device=x.device)
    table_gradient = None
    logits = torch.empty((tokens, vocabulary_size), dtype=torch.float32, device=x.device)
    rows = max(1, _BLOCK_BYTES // (4 * vocabulary_size)) if x.device.type == "cpu" else tokens
    for i in range(count):
        _product(x[i], compute.T, logits)
        by_token = settings.by_token(*chunk_targets(targets, i))
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            sums += settings.in_place(logits[part], *(array[part] for array in by_token))
        gradient = logits.to(x.dtype)
        _product(gradient, compute, x_gradient[i])
        if not train_table:
            continue
        if table_gradient is None:  # the first chunk's, so that there are no zeros to add it to
            table_gradient = torch.mm(gradient.T, x[i]).float()
        elif x.dtype == torch.float32:
            table_gradient.addmm_(gradient.T, x[i])
        else:
            table_gradient.add_(torch.mm(gradient.T, x[i]))
    return (sums, x_gradient, table_gradient) if train_table else (sums, x_gradient)


def _product(left, right, out):
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    else:
        out.copy_(finite(torch.mm(left, right)))


def to_gradients(settings, logits, labels, shares):
    """Turns raw logits [r, V] into their gradients, in place; returns [loss, accuracy]."""
    slope = None
    if settings.cap is not None:
        logits.div_(settings.cap).tanh_()
        slope = torch.addcmul(torch.ones((), device=logits.device), logits, logits, value=-1)
        logits.mul_(settings.cap)
    labels, shares = labels.long().unsqueeze(-1), shares.unsqueeze(-1)
    picked, largest = logits.gather(-1, labels), logits.amax(-1, keepdim=True)
    smoothing = settings.label_smoothing
    mean = logits.mean(-1, keepdim=True) if smoothing else 0.0
    logits.sub_(largest).exp_()
    total = logits.sum(-1, keepdim=True)
    log_sum = largest + total.log()
    losses = log_sum - (1 - smoothing) * picked - smoothing * mean + settings.z_loss * log_sum.square()
    logits.mul_(shares * (1 + 2 * settings.z_loss * log_sum) / total)
    if smoothing:
        logits.sub_(shares * (smoothing / logits.shape[-1]))
    logits.scatter_add_(-1, labels, -shares * (1 - smoothing))
    if slope is not None:
        logits.mul_(slope)
    return (shares * torch.cat([losses, (picked >= largest).float()], -1)).sum(0)
