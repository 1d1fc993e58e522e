"""PyTorch's lookup in a table, but for its gradient, which is zero nearly everywhere."""

import math
import mmap

import torch


def serves(table):
    """Whether a gradient is wanted, on a CPU whose system makes pages of zeros as they are written to."""
    wanted = torch.is_grad_enabled() and table.requires_grad and not torch.compiler.is_compiling()
    return wanted and table.device.type == "cpu" and hasattr(mmap, "MAP_ANONYMOUS")  # which Windows lacks


class Rows(torch.autograd.Function):
    """Rows [B, T, D] of a table [V, D] by ids int64 [B, T]."""

    @staticmethod
    def forward(context, table, token_ids):
        """As in `torch.nn.functional.embedding`."""
        context.save_for_backward(token_ids)
        context.table = table.shape, table.dtype
        return torch.nn.functional.embedding(token_ids, table)

    @staticmethod
    def backward(context, gradient):
        """[V, D], the table's gradient, and none of the ids'."""
        (token_ids,) = context.saved_tensors
        zeros = unwritten_zeros(*context.table)
        rows = gradient.reshape(-1, gradient.shape[-1]).to(zeros.dtype)
        return zeros.index_add_(0, token_ids.reshape(-1), rows), None


def unwritten_zeros(shape, dtype):
    """A tensor of zeros, of which the system makes what is written to; the rest it reads from a page that it has.

    PyTorch writes its zeros: half a gigabyte, which the system has to find and clear first, takes 0.12 s on two cores
    and 0.04 to give back. This takes 0.003 and 0.006, and 0.04 more in the first pass over it (benchmarks/RESULTS.md).
    """
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # `.data`, since autograd would add to a view of it in a copy.
    return torch.frombuffer(memory, dtype=dtype).view(shape).data
