"""`quantize` on the layers that have something to quantize, and dtypes such as "int8_from_bfloat16"."""

import re

import keras

from keras_t5gemma._keras_internals import flatten_layers

# Of our layers those that Keras quantizes. It warns of each other one, and refuses a tokenizer, which is a layer too.
QUANTIZABLE = (keras.layers.Dense, keras.layers.Embedding)


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
    keras_quantize(mode, config=config, filters=lambda layer: id(layer) in chosen, **kwargs)


def unquantized(dtype):
    """What a dtype asks for, as `(dtype, mode, config)`.

    Args:
        dtype: a dtype policy, its name, or None.

    Returns:
        The policy to load in; the mode to quantize in then, or None; and a config if int4's size of blocks is given.
    """
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
