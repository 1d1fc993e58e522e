"""Products on PyTorch: few rows, and bfloat16, on CPUs."""

import keras
from keras import ops

from keras_t5gemma.kernels.device import on_cpu
from keras_t5gemma.kernels.matmul.reference import dense, float32_product  # noqa: F401 the rest of the interface

# Rows up to which the table comes first: twice as fast and more.
_FEW_ROWS = 3


def table_product(x, table):
    """As `reference.table_product`."""
    rows = ops.reshape(x, (-1, x.shape[2]))
    count = rows.shape[0]
    # In half precision another library multiplies, which is fastest with the rows first.
    if count > _FEW_ROWS or keras.backend.standardize_dtype(x.dtype) != "float32" or not on_cpu(x):
        # Not `einsum`, which takes thirty times as long in bfloat16 on CPUs.
        return ops.matmul(x, ops.transpose(table))
    # A single row is doubled in memory: of one vector PyTorch's library uses a third of the memory's speed on some
    # processors (57 against 18 ms, see benchmarks/log/2026-11-27-pytorch-single-row-doubled.md), and of one row seen
    # twice a sixth.
    columns = rows.T if count > 1 else rows.repeat(2, 1).T
    return ops.reshape((table @ columns)[:, :count].T.contiguous(), (*x.shape[:2], -1))
