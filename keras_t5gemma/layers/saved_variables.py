"""Layers that are saved and loaded unchanged: with their quantizers, and with LoRA beside the kernel.

Keras adds LoRA's product to the kernel in every file it writes, quantizes the sum once more if the layer is quantized,
and forgets which quantizers a layer was quantized by.
"""

import contextlib
import contextvars

import keras
import numpy as np

_quantized = contextvars.ContextVar("quantized", default=None)


@contextlib.contextmanager
def quantized_layers(layers):
    """Layers built inside are quantized from the start, with zeros for numbers that a file gives later.

    Args:
        layers: `{path of the layer: (dtype policy, quantization config or None)}`.
    """
    token = _quantized.set(layers)
    try:
        yield
    finally:
        _quantized.reset(token)


class SavedAsItIs:
    """For a subclass of `keras.layers.Dense` or `keras.layers.ReversibleEmbedding`."""

    _refusal = None  # why the last file's weights do not fit
    lora_names = ()  # LoRA's two matrices, [in, rank] and [rank, out], which `enable_lora` makes

    def build(self, input_shape=None):
        """As in Keras, and quantized if `quantized_layers` says so."""
        if (saved := (_quantized.get() or {}).get(self.path)) is not None:
            policy, self.quantization_config = saved
            self.dtype_policy = policy
        super().build(input_shape)

    def save_own_variables(self, store):
        """As in Keras, with the kernel as it is, and LoRA's matrices under their names."""
        enabled, self.lora_enabled = self.lora_enabled, False  # Keras then adds nothing to the kernel
        try:
            super().save_own_variables(store)
        finally:
            self.lora_enabled = enabled
        for name in self.lora_names if enabled else ():
            store[name] = getattr(self, name)

    def load_own_variables(self, store):
        """As in Keras. Weights without LoRA make LoRA start anew: its product is zero.

        Raises:
            ValueError: if the file holds LoRA and the layer has none, or of another rank, or if one is quantized and
                the other is not, or otherwise.
        """
        stored = {name: store[name] for name in store.keys()}  # noqa: SIM118 Keras's stores are not all mappings
        lora = {name: stored.pop(name) for name in self.lora_names if name in stored}
        if not stored and self._refusal:
            # Keras tries a layer that failed by its other paths too, and would show only what is missing there.
            raise ValueError(self._refusal)
        try:
            self._check_stored(stored, lora)
        except ValueError as error:
            self._refusal = str(error)
            raise
        self._refusal = None
        super().load_own_variables(stored)
        if not self.lora_enabled:
            return
        if not lora:
            # Keras has set both to zero, with which neither would ever have a gradient.
            first = getattr(self, self.lora_names[0])
            first.assign(keras.initializers.HeUniform()(first.shape, dtype=first.dtype))
        for name, values in lora.items():
            getattr(self, name).assign(values)

    def _check_stored(self, stored, lora):
        where = f"The file's weights do not fit {self.path}:"
        if lora and not self.lora_enabled:
            raise ValueError(
                f"{where} they are weights with LoRA, and the model has none. Call `backbone.enable_lora` as for the "
                f"model that was saved, or load the whole model with `keras.models.load_model` or `from_preset`."
            )
        for name, values in lora.items():
            if tuple(values.shape) != tuple(getattr(self, name).shape):
                raise ValueError(
                    f"{where} LoRA's rank is {min(values.shape)} in the file, and {self.lora_rank} in the model."
                )
        if not stored or self.quantization_mode not in (None, "int8", "int4"):
            return
        shapes = sorted(tuple(values.shape) for values in stored.values())
        expected = sorted(tuple(v.shape) for v in self.weights if v.path.rpartition("/")[2] not in self.lora_names)
        is_quantized = np.dtype(stored["0"].dtype) == "int8"
        if is_quantized != (self.quantization_mode is not None) or (is_quantized and shapes != expected):
            found = f"quantized, arrays of {shapes}" if is_quantized else "not quantized"
            raise ValueError(
                f"{where} they are {found}; the model's are {self.dtype_policy.name}. Call `quantize` as for the model "
                f"that was saved, or load the whole model with `keras.models.load_model` or `from_preset`."
            )
