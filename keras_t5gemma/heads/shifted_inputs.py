"""What the decoder reads if a head is on it: the text, shifted."""

import keras
from keras import ops

from keras_t5gemma.config import BOS_ID, PAD_ID
from keras_t5gemma.layers.copies import part_of_a_model


class ShiftedInputs(keras.layers.Layer):
    """The text moved one to the right after `<bos>`, which the decoder reads, as in `transformers`' classifiers.

        text      a b c . .      decoder  <bos> a b c .      mask  1 1 1 1 0
        text      a b c d e      decoder  <bos> a b c d      mask  1 1 1 1 1

    A text that fills the row loses its last token here; the encoder still reads it.
    """

    def call(self, token_ids):
        """Maps int [B, S] to the decoder's ids and mask, int32 [B, S] each. Ids of padding are masked."""
        ids = ops.cast(token_ids, "int32")
        shifted = ops.concatenate([ops.full_like(ids[:, :1], BOS_ID), ids[:, :-1]], axis=1)
        return shifted, ops.cast(shifted != PAD_ID, "int32")

    def compute_output_shape(self, input_shape):
        """Two of the input's shape."""
        return input_shape, input_shape

    def get_config(self):
        """Raises an error: the model's config contains this."""
        raise part_of_a_model(self)
