"""A Gemma 2 in Hugging Face's format, written without `transformers`."""

import numpy as np

from helpers.tiny import NamedArrays
from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config
from keras_t5gemma.checkpoints.hugging_face.writer import write_json, write_tensors

VOCABULARY_SIZE = 24


def write_gemma2(folder, stack):
    """Writes a folder with random weights, float32, and returns these by name.

    Args:
        folder: the path to create.
        stack: the `StackConfig`; what of it no size is stays at Gemma 2's own.
    """
    config = Gemma2Config(stack, VOCABULARY_SIZE, 30.0)
    generator = np.random.default_rng(0)
    arrays = {tensor.gemma2: generator.standard_normal(tensor.stored_shape, "float32") for tensor in config.tensors()}
    folder.mkdir()
    write_tensors(folder, NamedArrays(arrays))
    write_json(
        folder / "config.json",
        {
            "model_type": "gemma2",
            "vocab_size": VOCABULARY_SIZE,
            "num_hidden_layers": stack.num_layers,
            "hidden_size": stack.hidden_dim,
            "intermediate_size": stack.intermediate_dim,
            "num_attention_heads": stack.num_query_heads,
            "num_key_value_heads": stack.num_key_value_heads,
            "head_dim": stack.head_dim,
            "sliding_window": stack.sliding_window,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    return arrays
