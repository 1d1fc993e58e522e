"""The output projection: from the decoder's hidden states to logits over the vocabulary."""

import keras
from keras import ops

from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.embedding.quantized import has_block_product, product_by_blocks
from keras_t5gemma.kernels.float16 import clip_to_range
from keras_t5gemma.kernels.matmul import PACKAGE as MATMUL
from keras_t5gemma.kernels.soft_cap import soft_cap_in_place
from keras_t5gemma.layers.copies import part_of_a_model


class VocabularyProjection(keras.layers.Layer):
    """The output projection and the final soft cap. If tied, it is the transposed embedding table of the decoder.

    Args:
        embedding: the decoder's built `keras.layers.ReversibleEmbedding`.
        cap: `c` in `c * tanh(x / c)`, or None.
        **kwargs: `dtype` and `name`.
    """

    def __init__(self, embedding: keras.layers.ReversibleEmbedding, cap: float | None = None, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.embedding = embedding
        self.cap = cap
        self.built = True

    def call(self, x):
        """Maps [B, T, D] to float32 logits [B, T, V]."""
        return soft_cap_in_place(ops.cast(clip_to_range(self._project(x)), "float32"), self.cap)

    def get_config(self):
        """Raises an error: a separate copy would no longer be tied to its embedding."""
        raise part_of_a_model(self)

    @property
    def is_quantized(self) -> bool:
        """Whether the table is quantized, so that `table()` is not available."""
        return self.embedding.quantization_mode is not None

    def table(self):
        """The projection as one differentiable matrix [V, D], including LoRA."""
        embedding = self.embedding
        return embedding.embeddings if embedding.tie_weights else ops.transpose(embedding.reverse_embeddings)

    def _project(self, x):
        """Logits [B, T, V] before the cap, by the product that suits the table and the device."""
        embedding, product = self.embedding, implementation(MATMUL).table_product
        if has_block_product(embedding, x):
            return product_by_blocks(product, x, embedding)
        if self.is_quantized or not embedding.tie_weights:
            return embedding(x, reverse=True)
        # The table is used as stored. With `reverse=True`, XLA:CPU transposes it again for every decoded token.
        return product(x, ops.cast(embedding.embeddings, x.dtype))

    def compute_output_shape(self, input_shape):
        """[B, T, V]."""
        return (*input_shape[:-1], self.embedding.input_dim)
