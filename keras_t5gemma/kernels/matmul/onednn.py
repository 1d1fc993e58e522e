"""Products of float32 rows with a table by oneDNN, which PyTorch has and takes for bfloat16 alone.

For four rows to a hundred MKL, which it takes instead, needs twice the time on a processor of AMD's
(benchmarks/RESULTS.md).
"""

import torch

# What `torch.compile` makes of a linear layer; PyTorch has no public name for it.
_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def serves(*operands):
    """Whether `rows_times_table` may be asked: no gradients are wanted, and PyTorch was built with oneDNN."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    return not wanted and _linear is not None and torch.backends.mkldnn.is_available()


# An operation of this package's own, since `torch.compile` takes PyTorch's for constant tables alone.
@torch.library.custom_op("keras_t5gemma::rows_times_table", mutates_args=())
def rows_times_table(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Float32 [B, T, V] of x [B, T, D] and a table [V, D] on a CPU."""
    return _linear(x, table, None, "none", [], "")


@rows_times_table.register_fake
def _(x, table):
    return x.new_empty(*x.shape[:-1], table.shape[0])
