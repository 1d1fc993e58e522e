"""The chunked loss on PyTorch, in place: one buffer of logits becomes their gradients.

Through `keras.ops` each of a dozen steps would allocate a tensor of the logits' size: up to half a gigabyte that the
system has to find and clear. Compiled backends allocate none.
"""

import torch

from keras_t5gemma.kernels.cross_entropy.chunks import chunk_targets
from keras_t5gemma.kernels.cross_entropy.reference import tensor_of  # noqa: F401 the rest of the interface
from keras_t5gemma.kernels.cross_entropy.token_loss import CrossEntropy
from keras_t5gemma.kernels.device import on_cpu
from keras_t5gemma.kernels.float16 import clip_to_range
from keras_t5gemma.kernels.soft_cap import soft_cap

# Bytes of logits per block on a CPU, so that they stay in its cache between steps.
_BLOCK_BYTES = 2**22
# Rows of the table's gradient that are computed at a time if the compute dtype is not float32.
_ROWS_AT_ONCE = 2**15


def sums_and_gradients(token_loss, targets, x, table, train_table):
    """`reference.sums_and_gradients` with one buffer of logits for all chunks.

    Args:
        token_loss: a `CrossEntropy`, or an object with its methods.
        targets: `(by_token, shared)` as in `chunk_targets`.
        x: hidden states [C, m, D], in the compute dtype.
        table: the projection [V, D].
        train_table: whether the table's gradient is needed.

    Returns:
        `(sums, x_gradient)` or `(sums, x_gradient, table_gradient)`.
    """
    x = clip_to_range(x)
    compute, vocabulary_size = table.to(x.dtype), table.shape[0]
    count, tokens, width = x.shape
    sums = torch.zeros(2, dtype=torch.float32, device=x.device)
    x_gradient = torch.empty((count, tokens, width), dtype=torch.float32, device=x.device)
    table_gradient = None
    logits = torch.empty((tokens, vocabulary_size), dtype=x.dtype, device=x.device)
    for i in range(count):
        torch.mm(x[i], compute.T, out=logits)
        sums += _to_gradients_by_rows(token_loss, logits, token_loss.by_token(*chunk_targets(targets, i)))
        x_gradient[i] = clip_to_range(torch.mm(logits, compute))
        if train_table:
            table_gradient = _add_table_gradient(table_gradient, logits, x[i])
    return (sums, x_gradient, table_gradient) if train_table else (sums, x_gradient)


def scaled(gradients, scale):
    """`reference.scaled` for one backward pass, which empties the list. PyTorch's graphs also serve one by default.

    If the gradients were kept for a second backward pass, the table's gradient would outlive the optimizer's step.

    Raises:
        RuntimeError: on the second call.
    """
    if not gradients:
        raise RuntimeError(
            "This loss forms its gradients in the forward pass and gives them once: for a second `backward()`, run it "
            "again, or take the loss of logits."
        )
    # The scale is 1 unless the loss is added to or averaged with others. On a GPU the check would wait for the device.
    results = gradients[:] if on_cpu(scale) and scale == 1 else [gradient.mul_(scale) for gradient in gradients]
    gradients.clear()
    return results


def _to_gradients_by_rows(token_loss, logits, by_token):
    """Replaces a chunk's logits [m, V] of any dtype by their gradients, block by block; returns [loss, accuracy]."""
    tokens, vocabulary_size = logits.shape
    rows = max(1, _BLOCK_BYTES // (4 * vocabulary_size)) if logits.device.type == "cpu" else tokens
    sums = 0.0
    # The same two float32 blocks serve all rows: the system would have to find and clear new ones.
    blocks = torch.empty((2, min(rows, tokens), vocabulary_size), dtype=torch.float32, device=logits.device)
    for start in range(0, tokens, rows):
        part = logits[start : start + rows]
        wide, workspace = blocks[:, : len(part)]
        wide = part if logits.dtype == torch.float32 else wide.copy_(clip_to_range(part))
        sums = sums + in_place(token_loss, wide, workspace, *(array[start : start + rows] for array in by_token))
        if wide is not part:
            part.copy_(wide)
    return sums


def _add_table_gradient(total, gradient, x):
    """Adds one chunk's part to the table's gradient.

    Args:
        total: float32 [V, D], updated in place; None for the first chunk, which then is not added to zeros.
        gradient: the logits' gradients [m, V], in the compute dtype.
        x: hidden states [m, D], in the compute dtype.

    Returns:
        The sum, float32 [V, D].
    """
    if gradient.dtype == torch.float32:
        return torch.mm(gradient.T, x) if total is None else total.addmm_(gradient.T, x)
    first = total is None
    if first:
        total = torch.empty((gradient.shape[1], x.shape[1]), dtype=torch.float32, device=x.device)
    for start in range(0, len(total), _ROWS_AT_ONCE):
        part = torch.mm(gradient[:, start : start + _ROWS_AT_ONCE].T, x)
        (torch.Tensor.copy_ if first else torch.Tensor.add_)(total[start : start + _ROWS_AT_ONCE], part)
    return total


def in_place(token_loss, logits, workspace, *targets):
    """Replaces raw logits [r, V] by their gradients.

    Args:
        token_loss: a `CrossEntropy`; or another token loss, whose gradients are copied into `logits`.
        logits: float32 [r, V], overwritten.
        workspace: a tensor of the same shape, overwritten.
        *targets: the targets of the loss, [r, ...].

    Returns:
        `[loss, accuracy]`, float32 [2].
    """
    if isinstance(token_loss, CrossEntropy):
        return _cross_entropy_in_place(token_loss, logits, workspace, *targets)
    sums, gradient = token_loss.of_logits(soft_cap(logits, token_loss.cap), *targets, gradients=True)
    logits.copy_(gradient)
    return sums


def _cross_entropy_in_place(loss, logits, workspace, labels, shares):
    """`in_place` for a `CrossEntropy`: every step overwrites the logits or the workspace."""
    if loss.cap is not None:
        torch.div(logits, loss.cap, out=workspace).tanh_()
        torch.mul(workspace, loss.cap, out=logits)
    labels, shares = labels.long().unsqueeze(-1), shares.unsqueeze(-1)
    picked, largest = logits.gather(-1, labels), logits.amax(-1, keepdim=True)
    smoothing = loss.label_smoothing
    mean = logits.mean(-1, keepdim=True) if smoothing else 0.0
    logits.sub_(largest).exp_()
    total = logits.sum(-1, keepdim=True)
    log_sum = largest + total.log()
    losses = log_sum - (1 - smoothing) * picked - smoothing * mean + loss.z_loss * log_sum.square()
    logits.mul_(shares * (1 + 2 * loss.z_loss * log_sum) / total)
    if smoothing:
        logits.sub_(shares * (smoothing / logits.shape[-1]))
    logits.scatter_add_(-1, labels, -shares * (1 - smoothing))
    if loss.cap is not None:
        logits.addcmul_(logits, workspace.square_(), value=-1)
    return (shares * torch.cat([losses, (picked >= largest).float()], -1)).sum(0)
