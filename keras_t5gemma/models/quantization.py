"""`quantize`, and dtypes such as "int8_from_bfloat16"."""

import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence

import keras

from keras_t5gemma._keras_internals import flatten_layers, short_garbage_collections

# The layers of this package that Keras quantizes. It warns about every other layer, and refuses a tokenizer, which is a
# layer too.
QUANTIZABLE = (keras.layers.Dense, keras.layers.Embedding)
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
    model: keras.Model,
    keras_quantize: Callable,
    mode: str | None = None,
    config: keras.quantizers.QuantizationConfig | None = None,
    filters: str | Sequence[str] | Callable | None = None,
    **kwargs,
) -> None:
    """Quantizes the dense layers and embedding tables of a model.

    Args:
        model: a backbone, or a task model around one.
        keras_quantize: `keras.Model.quantize`, bound to the model.
        mode: as in `T5GemmaBackbone.quantize`, like the following arguments.
        config: a `keras.quantizers.QuantizationConfig`, or None.
        filters: selects the layers; None for all.
        **kwargs: further arguments of `keras.Model.quantize`.

    Raises:
        ValueError: if `filters` matches no layer that can be quantized.
    """
    layers = [layer for layer in flatten_layers(model) if isinstance(layer, QUANTIZABLE)]
    selected = {id(layer) for layer in layers if is_selected(layer, filters)}
    if not selected:
        names = ", ".join(sorted({layer.name for layer in layers}))
        raise ValueError(f"`filters` matches no layer that can be quantized. Received: {filters!r}. They are: {names}.")
    with short_garbage_collections():
        keras_quantize(mode, config=config, filters=lambda layer: id(layer) in selected, **kwargs)


def warn_of_quantized_weights(model: keras.Model) -> None:
    """Warns if `fit` would train little more than norms, because quantized weights are not trained."""
    layers = [layer for layer in flatten_layers(model) if getattr(layer, "quantization_mode", None)]
    if not layers or any(getattr(layer, "lora_enabled", False) for layer in layers):
        return
    rest = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    warnings.warn(
        f"Quantized weights are not trained: `fit` changes {rest:,} numbers in other layers, such as norms. Call "
        f"`enable_lora` on the backbone first to train LoRA on top of quantized weights.",
        stacklevel=2,
    )


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
