"""What results say about the model that they are of."""

import sys

import keras

from keras_t5gemma._keras_internals import flatten_layers


def model_info(lm, preset: str | None) -> dict:
    """Facts about a model, as plain values.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        preset: its preset, or None if that is not known.

    Returns:
        A dict: versions, `preset`, `backend`, `dtype`, `quantization` (modes of the quantized layers, or None) and
        `num_parameters`.
    """
    modes = {getattr(layer, "quantization_mode", None) for layer in flatten_layers(lm.backbone)} - {None}
    return {
        "keras_t5gemma": sys.modules["keras_t5gemma"].__version__,  # imported, as this module is in it
        "keras": keras.__version__,
        "preset": preset,
        "backend": keras.config.backend(),
        "dtype": lm.backbone.dtype_policy.name,
        "quantization": ", ".join(sorted(modes)) or None,
        "num_parameters": lm.backbone.count_params(),
    }
