"""`quantize`, and dtypes such as "int8_from_bfloat16"."""

import functools
import re
from collections.abc import Callable, Sequence

import keras

from keras_t5gemma._keras_internals import flatten_layers, short_garbage_collections

_MODES = '"int8", "int4", or "int4/32" and the like for int4 in blocks of 32'


class QuantizationMixin:
    """Mixin for a `keras.Model`: `quantize` accepts exactly the modes of this package, which include int4 in blocks.

    Keras wraps the `quantize` of each new layer in a function that resolves mode and config before the layer's own
    method runs. So this class wraps it again.
    """

    def __new__(cls, *args, **kwargs):
        """Creates the model and wraps its `quantize`."""
        model = super().__new__(cls, *args, **kwargs)
        keras_quantize = getattr(model, "quantize", None)
        if keras_quantize is None:  # Keras also creates one instance of each base class
            return model

        @functools.wraps(keras_quantize)
        def quantize(mode=None, config=None, filters=None, **kwargs):
            requested = mode if config is None else getattr(config, "mode", config)
            if not isinstance(requested, str) or not re.fullmatch(r"int8|int4(/(-1|[1-9]\d*))?", requested):
                raise ValueError(f"`mode` must be {_MODES}. Received: {requested!r}.")
            if isinstance(mode, str) and "/" in mode and config is None:
                mode, config = None, unquantized(f"{mode}_from_float32")[2]
            return keras_quantize(mode, config, filters=filters, **kwargs)

        model.quantize = quantize
        return model

    def quantize(
        self,
        mode: str | None = None,
        config: keras.quantizers.QuantizationConfig | None = None,
        filters: str | Sequence[str] | Callable | None = None,
        **kwargs,
    ) -> None:
        """Quantizes the dense layers and the embedding tables of the stacks, as `keras.Model.quantize` does.

        Args:
            mode: "int8", "int4", or e.g. "int4/32" for int4 in blocks of 32 numbers; may be left out with a config.
            config: a `keras.quantizers.QuantizationConfig`.
            filters: selects the layers: a regular expression that is searched for in the layer's name, a list of
                these, or a function of a layer.
            **kwargs: further arguments of `keras.Model.quantize`.

        Raises:
            ValueError: if the mode is unknown, or if `filters` matches no layer that can be quantized.
        """
        layers = [layer for layer in flatten_layers(self) if self.is_quantizable(layer)]
        selected = {id(layer) for layer in layers if is_selected(layer, filters)}
        if not selected:
            names = ", ".join(sorted({layer.name for layer in layers}))
            raise ValueError(
                f"`filters` matches no layer that can be quantized. Received: {filters!r}. They are: {names}."
            )
        with short_garbage_collections():
            super().quantize(mode, config=config, filters=lambda layer: id(layer) in selected, **kwargs)

    def is_quantizable(self, layer: keras.layers.Layer) -> bool:
        """Whether `quantize` may quantize a layer. Keras warns about others, and refuses tokenizers, layers too."""
        return isinstance(layer, (keras.layers.Dense, keras.layers.Embedding))


def unquantized(
    dtype: str | keras.DTypePolicy | None,
) -> tuple[str | keras.DTypePolicy | None, str | None, keras.quantizers.QuantizationConfig | None]:
    """Splits a dtype such as "int8_from_bfloat16" into the dtype to load in and the quantization that follows.

    Args:
        dtype: a dtype policy, its name, or None.

    Returns:
        `(dtype, mode, config)`: the policy to load in; the mode to quantize in afterwards, or None; and a config if the
        policy names int4's block size.

    Raises:
        ValueError: if the dtype is a mode alone, such as "int8".
    """
    if isinstance(dtype, str) and re.fullmatch(r"int8|int4(/-?\d+)?", dtype):
        raise ValueError(
            f'`dtype` must also name the dtype of the weights before quantization. Use "{dtype}_from_bfloat16". '
            f"Received: dtype={dtype!r}."
        )
    policy = None if dtype is None else keras.dtype_policies.get(dtype)
    mode = getattr(policy, "quantization_mode", None)
    if mode is None:
        return dtype, None, None
    config = None
    if isinstance(policy, keras.dtype_policies.Int4DTypePolicy):
        config = keras.quantizers.Int4QuantizationConfig(block_size=policy.block_size)
    return policy.name.partition("_from_")[2], mode, config


def is_selected(layer: keras.layers.Layer, filters: str | Sequence[str] | Callable | None) -> bool:
    """Whether `filters` selects a layer, by Keras's rules."""
    if filters is None:
        return True
    if callable(filters):
        return filters(layer)
    return any(re.search(pattern, layer.name) for pattern in ([filters] if isinstance(filters, str) else filters))
