"""Random tensors of a checkpoint by name."""

import numpy as np

from helpers.peers import tiny_config
from keras_t5gemma.checkpoints.tensor_table import tensor_specs

CONFIG = tiny_config(balanced=False, num_layers=2)


def drawn(seed, dtype, config=CONFIG):
    generator = np.random.default_rng(seed)
    return {
        tensor.name: generator.standard_normal(tensor.stored_shape).astype("float32").astype(dtype)
        for tensor in tensor_specs(config)
    }
