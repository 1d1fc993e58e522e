"""Parameters of T5Gemma as Orbax's trees hold them, changed and compared."""

import json

import ml_dtypes
import torch

from helpers.peers import hf_t5gemma


def weights_of(config, dtype="float32", seed=0):
    """The tensors of a Hugging Face T5Gemma by name."""
    model = hf_t5gemma(config, seed)
    if dtype == "bfloat16":
        return {
            name: parameter.to(torch.bfloat16).detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            for name, parameter in model.named_parameters()
        }
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def assert_same(source, weights):
    assert sorted(source.names()) == sorted(weights)
    for name, expected in weights.items():
        found = source.read(name)
        assert found.dtype == source.dtype(name) == expected.dtype, name
        assert found.shape == source.shape(name) == expected.shape, name
        assert found.tobytes() == expected.tobytes(), name


def metadata_of(folder):
    return json.loads((folder / "_METADATA").read_text())


def without(tree, path):
    """A copy of a tree without one of its branches, and without what that leaves empty."""
    key, _, rest = path.partition("/")
    branches = {k: without(v, rest) if k == key and rest else v for k, v in tree.items() if k != key or rest}
    return {k: branch for k, branch in branches.items() if not isinstance(branch, dict) or branch}


def replaced(tree, path, array):
    """A copy of a tree with one parameter put there."""
    key, _, rest = path.partition("/")
    return tree | {key: replaced(tree.get(key, {}), rest, array) if rest else array}
