"""`quantize`, and dtypes such as "int8_from_bfloat16"."""

import functools
import re

import keras

from keras_t5gemma._keras_internals import flatten_layers, short_garbage_collections

# Of our layers those that Keras quantizes. It warns of each other one, and refuses a tokenizer, which is a layer too.
QUANTIZABLE = (keras.layers.Dense, keras.layers.Embedding)
_MODES = '"int8", "int4", or "int4/32" and the like for int4 in blocks of 32'


class Quantizes:
    """Mixed into a `keras.Model`: `quantize` takes the modes of this package, int4 in blocks among them, and no others.

    Keras wraps each new layer's `quantize` in a function that resolves mode and config before the layer's own method
    sees them. So this wraps once more.
    """

    def __new__(cls, *args, **kwargs):
        """A model as Keras makes it."""
        made = super().__new__(cls, *args, **kwargs)
        by_keras = getattr(made, "quantize", None)
        if by_keras is None:  # Keras makes an instance of each base class once, too
            return made

        @functools.wraps(by_keras)
        def quantize(mode=None, config=None, filters=None, **kwargs):
            asked = mode if config is None else getattr(config, "mode", config)
            if not isinstance(asked, str) or not re.fullmatch(r"int8|int4(/(-1|[1-9]\d*))?", asked):
                raise ValueError(f"`mode` must be {_MODES}. Received: {asked!r}.")
            if isinstance(mode, str) and "/" in mode and config is None:
                mode, config = None, unquantized(f"{mode}_from_float32")[2]
            return by_keras(mode, config, filters=filters, **kwargs)

        made.quantize = quantize
        return made


def quantize(model, keras_quantize, mode=None, config=None, filters=None, **kwargs):
    """Quantizes what there is to quantize of a model.

    Args:
        model: a backbone, or a task model around one.
        keras_quantize: its class's `keras.Model.quantize`.
        mode: as there.
        config: as there.
        filters: as there.
        **kwargs: as there.

    Raises:
        ValueError: if `filters` matches no layer that can be quantized.
    """
    layers = [layer for layer in flatten_layers(model) if isinstance(layer, QUANTIZABLE)]
    chosen = {id(layer) for layer in layers if _is_chosen(layer, filters)}
    if not chosen:
        names = ", ".join(sorted({layer.name for layer in layers}))
        raise ValueError(f"`filters` matches no layer that can be quantized. Received: {filters!r}. They are: {names}.")
    with short_garbage_collections():
        keras_quantize(mode, config=config, filters=lambda layer: id(layer) in chosen, **kwargs)


def unquantized(dtype):
    """What a dtype asks for, as `(dtype, mode, config)`.

    Args:
        dtype: a dtype policy, its name, or None.

    Returns:
        The policy to load in; the mode to quantize in then, or None; and a config if int4's size of blocks is given.

    Raises:
        ValueError: for a mode alone.
    """
    if isinstance(dtype, str) and re.fullmatch(r"int8|int4(/-?\d+)?", dtype):
        raise ValueError(
            f'`dtype` must say, too, what the weights are before they are quantized. Use "{dtype}_from_bfloat16". '
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


def _is_chosen(layer, filters):
    """As Keras reads `filters`."""
    if filters is None:
        return True
    if callable(filters):
        return filters(layer)
    return any(re.search(pattern, layer.name) for pattern in ([filters] if isinstance(filters, str) else filters))
