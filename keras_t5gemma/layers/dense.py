"""A matrix product as a layer, without bias or activation."""

import functools

import keras

from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.matmul import PACKAGE as MATMUL
from keras_t5gemma.layers.saved_variables import SavedUnchanged


class Dense(SavedUnchanged, keras.layers.Dense):
    """`keras.layers.Dense` without bias or activation. It is saved and loaded unchanged."""

    lora_names = ("lora_kernel_a", "lora_kernel_b")

    def call(self, inputs, training=None):
        """Maps [M, K] to [M, N]."""
        call = functools.partial(super().call, training=training)
        return implementation(MATMUL).dense(call, inputs, self.kernel)

    def quantize(self, mode=None, type_check=True, config=None):  # noqa: ARG002 the check would refuse this subclass
        """Quantizes the kernel as `keras.layers.Dense` does.

        Args:
            mode: "int8" or "int4".
            type_check: ignored: Keras's type check accepts only its own class.
            config: a `keras.quantizers.QuantizationConfig`, or None.
        """
        super().quantize(mode, type_check=False, config=config)
