"""Rows of a table of embeddings, whatever it holds."""

from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.embedding import PACKAGE
from keras_t5gemma.kernels.embedding.quantized import int4_rows


def look_up(embedding, token_ids, only_gradient=False):
    """Rows of a table of embeddings.

    Args:
        embedding: a built `keras.layers.ReversibleEmbedding`, perhaps quantized or with LoRA.
        token_ids: int [B, T].
        only_gradient: whether nothing else, such as a projection, gives the table a gradient.

    Returns:
        [B, T, D], which may have the table's dtype.
    """
    mode = embedding.quantization_mode
    if embedding.lora_enabled or mode not in (None, "int4"):
        return embedding(token_ids)
    if mode == "int4":
        return int4_rows(embedding, token_ids)
    return implementation(PACKAGE).rows(embedding, token_ids, only_gradient)
