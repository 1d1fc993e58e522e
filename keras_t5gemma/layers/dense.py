"""A matrix product as a layer, without bias or activation."""

import functools

import keras

from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.matmul import PACKAGE as MATMUL
from keras_t5gemma.layers.saved_variables import SavedAsItIs


class Dense(SavedAsItIs, keras.layers.Dense):
    """`keras.layers.Dense` without bias or activation, which comes back from a file as it was."""

    lora_names = ("lora_kernel_a", "lora_kernel_b")

    def call(self, inputs, training=None):
        """Maps [M, K] to [M, N]."""
        call = functools.partial(super().call, training=training)
        return implementation(MATMUL).dense(call, inputs, self.kernel)

    def quantize(self, mode=None, type_check=True, config=None):  # noqa: ARG002 it is no other layer in int8 or int4
        """As `keras.layers.Dense`, which refuses any other class by itself."""
        super().quantize(mode, type_check=False, config=config)
