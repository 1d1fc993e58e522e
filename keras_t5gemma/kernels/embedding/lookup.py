"""Rows of a table of embeddings, whatever it is made of."""

import keras
from keras import ops

from keras_t5gemma.kernels.barriers import settled
from keras_t5gemma.kernels.embedding.quantized import int4_rows
from keras_t5gemma.kernels.matmul.xla import has_quick_kernel


def look_up(embedding, token_ids, alone=False):
    """Rows of a table of embeddings.

    Args:
        embedding: a built `keras.layers.ReversibleEmbedding`.
        token_ids: int [B, T].
        alone: whether nothing else, such as a projection, gives its table a gradient.

    Returns:
        [B, T, D], which may have the table's dtype.
    """
    mode = embedding.quantization_mode
    if embedding.lora_enabled or mode not in (None, "int4"):
        return embedding(token_ids)
    if mode == "int4":
        return int4_rows(embedding, token_ids)
    table = embedding.embeddings.value
    if has_quick_kernel(table):
        # XLA takes rows of float32, to which it would convert the table before a loop; so it knows it as another table
        # for each lookup, and converts the rows.
        return ops.take(*settled((table, token_ids)), axis=0)
    # Over several devices, the layer sees to where its output lies.
    if keras.config.backend() == "jax" and alone and keras.distribution.distribution() is None:
        from keras_t5gemma.kernels.embedding import jax as lookup_jax

        return lookup_jax.rows(table, token_ids)
    # PyTorch's own gradient has zeros that take as long to write as the table takes to read three times.
    if keras.config.backend() == "torch":
        from keras_t5gemma.kernels.embedding import torch as lookup_torch

        if lookup_torch.serves(table):
            return lookup_torch.Rows.apply(table, token_ids.long())
    return embedding(token_ids)
