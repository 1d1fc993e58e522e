"""From the decoder's hidden states to logits over the vocabulary."""

import keras
from keras import ops

from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.embedding.quantized import has_block_product, product_by_blocks
from keras_t5gemma.kernels.float16 import clip_to_range
from keras_t5gemma.kernels.matmul import PACKAGE as MATMUL
from keras_t5gemma.kernels.soft_cap import soft_cap_in_place
from keras_t5gemma.layers.copies import part_of_a_model


class VocabularyProjection(keras.layers.Layer):
    """The output projection: the decoder's embedding table, transposed where tied, and the final soft cap.

    Args:
        embedding: the decoder's built `keras.layers.ReversibleEmbedding`.
        cap: `c` in `c * tanh(x / c)`, or None.
    """

    def __init__(self, embedding, cap=None, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.embedding = embedding
        self.cap = cap
        self.built = True

    def call(self, x):
        """Maps [B, T, D] to float32 logits [B, T, V]."""
        return soft_cap_in_place(ops.cast(clip_to_range(self._project(x)), "float32"), self.cap)

    def get_config(self):
        """Refused: a copy made by itself would not be tied to its embedding any more."""
        raise part_of_a_model(self)

    @property
    def is_quantized(self):
        """Whether there is no `table()` of floating-point numbers."""
        return self.embedding.quantization_mode is not None

    def table(self):
        """The projection as one differentiable [V, D], LoRA included."""
        embedding = self.embedding
        return embedding.embeddings if embedding.tie_weights else ops.transpose(embedding.reverse_embeddings)

    def _project(self, x):
        embedding, product = self.embedding, implementation(MATMUL).table_product
        if has_block_product(embedding, x):
            return product_by_blocks(product, x, embedding)
        if self.is_quantized or not embedding.tie_weights:
            return embedding(x, reverse=True)
        # The table as it is stored: through `reverse=True` XLA:CPU transposes it anew for every token decoded.
        return product(x, ops.cast(embedding.embeddings, x.dtype))

    def compute_output_shape(self, input_shape):
        """[B, T, V]."""
        return (*input_shape[:-1], self.embedding.input_dim)
