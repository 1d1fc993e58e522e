"""Writes into the key and value cache of decoding."""

import keras
from keras import ops


def write_at(buffer, update, index, axis: int = 1):
    """Writes `update` into `buffer` along one axis.

    Args:
        buffer: tensor of the update's shape, except that it is longer along `axis`.
        update: the new values.
        index: the first position along `axis` to write; an int or a scalar tensor.
        axis: the axis along which positions are counted.

    Returns:
        The updated buffer. On PyTorch without gradients it is the same tensor.
    """
    if keras.config.backend() == "torch":
        import torch

        # Keras's slice_update clones the whole buffer on PyTorch; compiled backends update in place by themselves.
        if not torch.is_grad_enabled() and buffer.device.type != "meta":
            buffer = buffer.contiguous()  # a sampler may have expanded a batch of one without allocating memory
            # A tensor of positions rather than a slice: a slice waits until the device has computed the index.
            positions = torch.arange(update.shape[axis], device=buffer.device) + index
            return buffer.index_copy_(axis, positions, update)
    start = [0] * len(buffer.shape)
    start[axis] = index
    return ops.slice_update(buffer, start, update)
