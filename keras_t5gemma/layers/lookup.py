"""Rows of a table of embeddings, whatever it is made of."""

import functools
import math
import mmap

import keras

from keras_t5gemma.layers.device import on_cpu
from keras_t5gemma.layers.quantized_table import int4_rows


def look_up(embedding, token_ids):
    """[B, T, D] of ids [B, T] and a built `keras.layers.ReversibleEmbedding`; it may have the table's dtype."""
    if embedding.quantization_mode == "int4" and not embedding.lora_enabled:
        return int4_rows(embedding, token_ids)
    if keras.config.backend() == "torch" and _is_trained(embedding):
        return _rows().apply(embedding.embeddings.value, token_ids.long())
    return embedding(token_ids)


def _is_trained(embedding):
    """Whether a plain table on a CPU is to have a gradient."""
    import torch

    if embedding.quantization_mode is not None or embedding.lora_enabled or not torch.is_grad_enabled():
        return False
    table = embedding.embeddings.value
    return table.requires_grad and on_cpu(table)


@functools.cache
def _rows():
    """PyTorch's lookup, but for its gradient, which is zero nearly everywhere: see `_zeros`."""
    import torch

    class Rows(torch.autograd.Function):
        """Rows [B, T, D] of a table [V, D] by ids [B, T]."""

        @staticmethod
        def forward(context, table, token_ids):
            context.save_for_backward(token_ids)
            context.table = table.shape, table.dtype
            return torch.nn.functional.embedding(token_ids, table)

        @staticmethod
        def backward(context, gradient):
            (token_ids,) = context.saved_tensors
            zeros = _zeros(*context.table)
            rows = gradient.reshape(-1, gradient.shape[-1]).to(zeros.dtype)
            return zeros.index_add_(0, token_ids.reshape(-1), rows), None

    return Rows


def _zeros(shape, dtype):
    """A tensor of zeros that the system makes only where something is written: it reads others from one page.

    PyTorch writes its zeros: half a gigabyte, which the system has to find and clear first, takes 0.12 s here and 0.04
    to give back, for 0.003 and 0.006, and 0.04 more in the first pass over it (benchmarks/RESULTS.md).
    """
    import torch

    size = math.prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # `.data`, since autograd would add to a view of it in a copy.
    return torch.frombuffer(memory, dtype=dtype).view(shape).data
