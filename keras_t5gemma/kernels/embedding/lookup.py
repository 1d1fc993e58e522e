"""Looks up rows of an embedding table of any dtype."""

from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.embedding import PACKAGE
from keras_t5gemma.kernels.embedding.quantized import int4_rows


def look_up(embedding, token_ids, only_gradient: bool = False):
    """Rows of an embedding table.

    Args:
        embedding: a built `keras.layers.ReversibleEmbedding`, which may be quantized or have LoRA.
        token_ids: int [B, T].
        only_gradient: whether no other operation, such as a projection, gives the table a gradient.

    Returns:
        [B, T, D], which may have the table's dtype.
    """
    mode = embedding.quantization_mode
    if embedding.lora_enabled or mode not in (None, "int4"):
        return embedding(token_ids)
    if mode == "int4":
        return int4_rows(embedding, token_ids)
    return implementation(PACKAGE).rows(embedding, token_ids, only_gradient)
