"""A table of embeddings as a layer, which is quantized some rows at a time."""

import keras
import numpy as np

from keras_t5gemma._keras_internals import variable_array
from keras_t5gemma.layers.saved_variables import SavedAsItIs

# Rows of a table that are quantized at a time; Keras collects garbage after each.
_QUANTIZED_AT_ONCE = 2**15


class Embedding(SavedAsItIs, keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding`, which is quantized some rows at a time, with the same outcome.

    It comes back from a file as it was.
    """

    lora_names = ("lora_embeddings_a", "lora_embeddings_b")

    def quantize(self, mode=None, type_check=True, config=None):  # noqa: ARG002 it is no other layer in int8 or int4
        """As `keras.layers.ReversibleEmbedding`, unless a quantizer of `config`'s own may look at several rows."""
        by_row = mode in ("int8", "int4") and (config is None or config.weight_quantizer is None)
        if not by_row or not self.tie_weights or self.lora_enabled:
            super().quantize(mode, type_check=False, config=config)
            return
        parts = [self._quantized(start, mode, config) for start in range(0, self.input_dim, _QUANTIZED_AT_ONCE)]
        self.quantization_config = config
        policy, arrays = parts[0][0], zip(*(arrays for _, arrays in parts), strict=True)
        del self._embeddings
        self.quantized_build((self.input_dim, self.output_dim), mode, config)
        for variable, rows in zip(_quantized_variables(self), arrays, strict=True):
            variable.assign(np.concatenate(rows))
        self.dtype_policy = policy

    def _quantized(self, start, mode, config):
        """The dtype policy and the arrays that Keras makes of some rows."""
        rows = self._embeddings.value[start : start + _QUANTIZED_AT_ONCE]
        options = {"embeddings_initializer": "zeros", "dtype": self.dtype_policy}
        part = keras.layers.ReversibleEmbedding(rows.shape[0], self.output_dim, **options)
        part.build()
        part.embeddings.assign(rows)
        part.quantize(mode, config=config)
        return part.dtype_policy, [variable_array(variable) for variable in _quantized_variables(part)]


def _quantized_variables(embedding):
    """Numbers and scales, and in blocks of inputs the zeros."""
    names = ("_embeddings", "embeddings_scale", "embeddings_zero")
    return [getattr(embedding, name) for name in names if hasattr(embedding, name)]
