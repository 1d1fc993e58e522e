"""A matrix product as a layer, without bias or activation."""

import functools

import keras
from keras import ops

from keras_t5gemma.kernels.matmul.xla import dense_product, has_quick_kernel, is_lone_row, twice
from keras_t5gemma.layers.saved_variables import SavedAsItIs


class Dense(SavedAsItIs, keras.layers.Dense):
    """`keras.layers.Dense` without bias or activation, which comes back from a file as it was."""

    lora_names = ("lora_kernel_a", "lora_kernel_b")

    def call(self, inputs, training=None):
        """Maps [M, K] to [M, N]."""
        if has_quick_kernel(inputs):
            return dense_product(inputs, ops.convert_to_tensor(self.kernel, inputs.dtype))
        if is_lone_row(inputs):
            return twice(functools.partial(super().call, training=training), inputs)
        return super().call(inputs, training=training)

    def quantize(self, mode=None, type_check=True, config=None):  # noqa: ARG002 it is no other layer in int8 or int4
        """As `keras.layers.Dense`, which refuses any other class by itself."""
        super().quantize(mode, type_check=False, config=config)
