"""Whether gradients are recorded, which only PyTorch does for each operation."""

import contextlib

import keras


def without_gradients():
    """A context in which nothing is kept for a backward pass."""
    if keras.config.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def may_overwrite():
    """Whether tensors may be changed in place: on PyTorch without gradients.

    There each step would else make a tensor of the logits' size, which the system has to find and clear.
    """
    if keras.config.backend() != "torch":
        return False
    import torch

    return not torch.is_grad_enabled()
