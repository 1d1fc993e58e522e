"""Whether gradients are recorded. Only PyTorch decides this for each operation."""

import contextlib

import keras


def without_gradients() -> contextlib.AbstractContextManager:
    """A context in which nothing is stored for a backward pass."""
    if keras.config.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def may_overwrite() -> bool:
    """Whether tensors may be changed in place: on PyTorch if gradients are not recorded.

    Otherwise each step there allocates a tensor of the logits' size, which the system has to find and clear.
    """
    if keras.config.backend() != "torch":
        return False
    import torch

    return not torch.is_grad_enabled()
