"""Layers between the stacks and a head: the decoder's shifted input, and one vector per text."""

import keras
from keras import ops

from keras_t5gemma.config import BOS_ID, PAD_ID
from keras_t5gemma.layers.copies import part_of_a_model

POOLINGS = ("last", "mean")


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


class Pooling(keras.layers.Layer):
    """One vector per text, float32.

    Args:
        pooling: "last" for the last token that is not padding; "mean" for the mean of all tokens.
        ahead: how far behind the last token of the text to read: 1 in the decoder, whose input is shifted. The position
            is at most the row's last one, so a text that fills the row is read one token early, as in `transformers`.
        **kwargs: `dtype` and `name`.
    """

    def __init__(self, pooling: str, ahead: int = 0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.pooling, self.ahead = pooling, ahead

    def call(self, hidden, mask):
        """Maps [B, S, D] and the text's mask [B, S] to [B, D]; with `ahead`, "mean" takes as many positions more."""
        hidden = ops.cast(hidden, "float32")
        length = ops.shape(mask)[1]
        positions = ops.arange(length, dtype="int32")
        used = ops.cast(mask != 0, "int32")
        last = ops.minimum(ops.max(used * positions, axis=1) + self.ahead, length - 1)
        if self.pooling == "last":
            weights = ops.cast(positions[None, :] == last[:, None], "float32")
        else:
            if self.ahead:
                used = ops.concatenate([ops.ones_like(used[:, :1]), used[:, :-1]], axis=1)
            counts = ops.cast(ops.maximum(ops.sum(used, axis=1, keepdims=True), 1), "float32")
            weights = ops.cast(used, "float32") / counts
        # Not a product with the mask: the output at padding must not matter even if it is NaN.
        hidden = ops.where(ops.expand_dims(weights, 2) != 0, hidden, 0.0)
        return ops.einsum("bs,bsd->bd", weights, hidden)

    def compute_output_shape(self, hidden_shape, mask_shape):
        """[B, D]."""
        del mask_shape
        return hidden_shape[0], hidden_shape[2]

    def compute_output_spec(self, hidden, mask):
        """float32 [B, D]."""
        return keras.KerasTensor(self.compute_output_shape(hidden.shape, mask.shape), "float32")

    def get_config(self):
        """Raises an error: the model's config contains this."""
        raise part_of_a_model(self)
