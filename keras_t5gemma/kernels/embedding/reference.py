"""Keras's own lookup in an embedding table."""


def rows(embedding, token_ids, only_gradient):  # noqa: ARG001 for implementations with their own gradient
    """Rows of an embedding table.

    Args:
        embedding: a built `keras.layers.ReversibleEmbedding` in floating point, without LoRA.
        token_ids: int [B, T].
        only_gradient: whether no other operation, such as a projection, gives the table a gradient.

    Returns:
        [B, T, D], which may have the table's dtype.
    """
    return embedding(token_ids)
