"""Products on PyTorch: faster forms on CPUs for few rows and for bfloat16."""

import keras
from keras import ops

from keras_t5gemma.kernels.device import on_cpu
from keras_t5gemma.kernels.matmul.reference import dense, float32_product  # noqa: F401 the rest of the interface

# Up to this many rows, the table comes first: at least twice as fast.
_FEW_ROWS = 3


def table_product(x, table):
    """`reference.table_product`, with the table first for few rows of float32 on CPUs."""
    rows = ops.reshape(x, (-1, x.shape[2]))
    count = rows.shape[0]
    # In half precision PyTorch uses another library, which is fastest with the rows first.
    if count > _FEW_ROWS or keras.backend.standardize_dtype(x.dtype) != "float32" or not on_cpu(x):
        # `einsum` takes thirty times as long in bfloat16 on CPUs.
        return ops.matmul(x, ops.transpose(table))
    # A single row is duplicated in memory. With one vector, PyTorch's library reaches a third of the memory bandwidth
    # on some processors (57 against 18 ms, see benchmarks/log/2026-11-27-pytorch-single-row-doubled.md). With one row
    # expanded to two without a copy, it reaches a sixth.
    columns = rows.T if count > 1 else rows.repeat(2, 1).T
    return ops.reshape((table @ columns)[:, :count].T.contiguous(), (*x.shape[:2], -1))
