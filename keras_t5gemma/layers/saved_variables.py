"""Layers that are saved and loaded unchanged: with their quantizers, and with LoRA beside the kernel.

Keras adds LoRA's product to the kernel in every file it writes. It quantizes the sum again if the layer is quantized.
It does not save the quantizers of a layer.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

import keras
import numpy as np

_quantized = contextvars.ContextVar("quantized", default=None)


@contextlib.contextmanager
def quantized_layers(layers: Mapping[str, tuple]) -> Iterator[None]:
    """A context in which layers are built quantized, with zeros for the numbers that a file provides later.

    Args:
        layers: `{path of the layer: (dtype policy, quantization config or None)}`.
    """
    token = _quantized.set(layers)
    try:
        yield
    finally:
        _quantized.reset(token)


class SavedUnchanged:
    """Mixin for subclasses of `keras.layers.Dense` and `keras.layers.ReversibleEmbedding`: saves them unchanged."""

    _load_error = None  # the message about the last file's weights if they do not fit
    lora_names = ()  # LoRA's two matrices, [in, rank] and [rank, out], which `enable_lora` creates

    def build(self, input_shape=None):
        """Builds the layer, quantized if `quantized_layers` lists it."""
        if (saved := (_quantized.get() or {}).get(self.path)) is not None:
            policy, self.quantization_config = saved
            self.dtype_policy = policy
        super().build(input_shape)

    def save_own_variables(self, store):
        """Stores the weights without LoRA's product, and LoRA's matrices under their names."""
        enabled, self.lora_enabled = self.lora_enabled, False  # so that Keras adds nothing to the kernel
        try:
            super().save_own_variables(store)
        finally:
            self.lora_enabled = enabled
        for name in self.lora_names if enabled else ():
            store[name] = getattr(self, name)

    def load_own_variables(self, store):
        """Loads the weights. If the file has no LoRA and the layer does, LoRA is initialized again with product zero.

        Raises:
            ValueError: if the file has LoRA and the layer does not, if the ranks differ, or if the file and the layer
                are not quantized in the same way.
        """
        stored = {name: store[name] for name in store.keys()}  # noqa: SIM118 Keras's stores are not all mappings
        lora = {name: stored.pop(name) for name in self.lora_names if name in stored}
        if not stored and self._load_error:
            # After a failure Keras tries the layer's other paths, and would report only what is missing there.
            raise ValueError(self._load_error)
        try:
            self._check_stored(stored, lora)
        except ValueError as error:
            self._load_error = str(error)
            raise
        self._load_error = None
        super().load_own_variables(stored)
        if not self.lora_enabled:
            return
        if not lora:
            # Keras has set both matrices to zero. Then neither would ever have a gradient.
            first = getattr(self, self.lora_names[0])
            first.assign(keras.initializers.HeUniform()(first.shape, dtype=first.dtype))
        for name, values in lora.items():
            getattr(self, name).assign(values)

    def _check_stored(self, stored, lora):
        """Raises an error if a file's arrays do not fit the layer. The message says what to call instead."""
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
            form = f"quantized, arrays of {shapes}" if is_quantized else "not quantized"
            raise ValueError(
                f"{where} they are {form}; the model's are {self.dtype_policy.name}. Call `quantize` as for the model "
                f"that was saved, or load the whole model with `keras.models.load_model` or `from_preset`."
            )
