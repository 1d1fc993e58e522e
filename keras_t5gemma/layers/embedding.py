"""An embedding table as a layer, which is quantized a block of rows at a time."""

import keras
import numpy as np

from keras_t5gemma._keras_internals import variable_array
from keras_t5gemma.layers.saved_variables import SavedUnchanged

# Rows of a table that are quantized at a time; Keras collects garbage after each.
_QUANTIZED_AT_ONCE = 2**15


class Embedding(SavedUnchanged, keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding`, quantized a block of rows at a time with the same result.

    It is saved and loaded unchanged.
    """

    lora_names = ("lora_embeddings_a", "lora_embeddings_b")

    def quantize(self, mode=None, type_check=True, config=None):  # noqa: ARG002 the check would refuse this subclass
        """Quantizes the table as `keras.layers.ReversibleEmbedding` does.

        A weight quantizer in `config` may need several rows. Then Keras quantizes the whole table at once.

        Args:
            mode: "int8" or "int4".
            type_check: ignored: Keras's type check accepts only its own class.
            config: a `keras.quantizers.QuantizationConfig`, or None.
        """
        is_row_wise = mode in ("int8", "int4") and (config is None or config.weight_quantizer is None)
        if not is_row_wise or not self.tie_weights or self.lora_enabled:
            super().quantize(mode, type_check=False, config=config)
            return
        parts = [self._quantize_rows(start, mode, config) for start in range(0, self.input_dim, _QUANTIZED_AT_ONCE)]
        self.quantization_config = config
        policy, arrays = parts[0][0], zip(*(arrays for _, arrays in parts), strict=True)
        del self._embeddings
        self.quantized_build((self.input_dim, self.output_dim), mode, config)
        for variable, rows in zip(_quantized_variables(self), arrays, strict=True):
            variable.assign(np.concatenate(rows))
        self.dtype_policy = policy

    def _quantize_rows(self, start, mode, config):
        """Quantizes the rows from `start` on by a layer of Keras; returns its dtype policy and its arrays."""
        rows = self._embeddings.value[start : start + _QUANTIZED_AT_ONCE]
        options = {"embeddings_initializer": "zeros", "dtype": self.dtype_policy}
        part = keras.layers.ReversibleEmbedding(rows.shape[0], self.output_dim, **options)
        part.build()
        part.embeddings.assign(rows)
        part.quantize(mode, config=config)
        return part.dtype_policy, [variable_array(variable) for variable in _quantized_variables(part)]


def _quantized_variables(embedding):
    """The variables of a quantized table: numbers, scales, and zeros if quantized in blocks of inputs."""
    names = ("_embeddings", "embeddings_scale", "embeddings_zero")
    return [getattr(embedding, name) for name in names if hasattr(embedding, name)]
