"""Tiny models of ours: loud random weights, or a peer's."""

import numpy as np

from helpers.peers import hf_t5gemma
from keras_t5gemma.checkpoints.load import load_into
from keras_t5gemma.checkpoints.tensor_source import TensorSource
from keras_t5gemma.models.backbone import T5GemmaBackbone


def backbone_of(config, **kwargs):
    """A backbone for a config."""
    return T5GemmaBackbone(**{**config.to_dict(), **kwargs})


def loud_backbone(config, seed=0, **kwargs):
    """A backbone whose weights are as loud as those in `peers`, norms included, and the same on every backend."""
    backbone = backbone_of(config, **kwargs)
    for variable, values in zip(backbone.weights, loud_weights(backbone, seed), strict=True):
        variable.assign(values)
    return backbone


def loud_weights(backbone, seed=0):
    """An array a weight, drawn in the order of `backbone.weights`."""
    generator = np.random.default_rng(seed)
    for variable in backbone.weights:
        shape = tuple(variable.shape)
        if len(shape) == 1:
            yield generator.uniform(-0.5, 1.0, shape).astype("float32")
        else:
            scale = 0.35 if "embedding" in variable.path else 1.7 * shape[0] ** -0.5
            yield (scale * generator.standard_normal(shape)).astype("float32")


def twins(config, seed=0, **kwargs):
    """`transformers`' model and our backbone, with the same loud weights."""
    peer = hf_t5gemma(config, seed)
    backbone = backbone_of(config, **kwargs)
    load_into(backbone, config, NamedArrays({name: tensor.numpy() for name, tensor in peer.state_dict().items()}))
    return peer, backbone


class NamedArrays(TensorSource):
    """Arrays by name as a `TensorSource`."""

    def __init__(self, arrays):
        self.arrays = arrays

    def names(self):
        return list(self.arrays)

    def shape(self, name):
        return self.arrays[name].shape

    def dtype(self, name):
        return self.arrays[name].dtype

    def read(self, name):
        return self.arrays[name]

    def where(self, name=None):
        return f"arrays ({name})"
