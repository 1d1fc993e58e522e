"""Writing into the keys and values that decoding keeps."""

import keras
from keras import ops


def write_at(buffer, update, index, axis=1):
    """Writes `update` into `buffer`, which is longer along `axis`, from position `index` on.

    Returns:
        The buffer with the update; on PyTorch without gradients it is the same tensor.
    """
    if keras.config.backend() == "torch":
        import torch

        # Keras's slice_update clones the whole buffer on PyTorch; compiled backends update in place by themselves.
        if not torch.is_grad_enabled() and buffer.device.type != "meta":
            buffer = buffer.contiguous()  # a sampler may have repeated a batch of one without giving it memory
            # By a tensor of places, since a slice would have to wait for the device to know the index.
            places = torch.arange(update.shape[axis], device=buffer.device) + index
            return buffer.index_copy_(axis, places, update)
    start = [0] * len(buffer.shape)
    start[axis] = index
    return ops.slice_update(buffer, start, update)
