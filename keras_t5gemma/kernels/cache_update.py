"""Writes into the key and value cache of decoding."""

import keras
from keras import ops


def is_per_row(index) -> bool:
    """Whether an index is a tensor [B], one position per row, rather than one position of all rows."""
    return len(getattr(index, "shape", ())) == 1


def write_at(buffer, update, index, axis: int = 1):
    """Writes `update` into `buffer` along one axis.

    Args:
        buffer: tensor of the update's shape, except that it is longer along `axis`.
        update: the new values. If there is an index per row, they are one position long along `axis`.
        index: the first position along `axis` to write; an int, a scalar tensor, or a position per row, int [B].
        axis: the axis along which positions are counted. If there is an index per row, it is 1 or 2.

    Returns:
        The updated buffer. On PyTorch without gradients it is the same tensor.
    """
    if keras.config.backend() == "torch":
        import torch

        # Keras's slice_update clones the whole buffer on PyTorch; compiled backends update in place by themselves.
        if not torch.is_grad_enabled() and buffer.device.type != "meta":
            buffer = buffer.contiguous()  # a sampler may have expanded a batch of one without allocating memory
            if is_per_row(index):
                positions = index.to(torch.int64).reshape(-1, *[1] * (update.ndim - 1)).expand(update.shape)
                return buffer.scatter_(axis, positions, update)
            # A tensor of positions rather than a slice: a slice waits until the device has computed the index.
            positions = torch.arange(update.shape[axis], device=buffer.device) + index
            return buffer.index_copy_(axis, positions, update)
    if is_per_row(index):
        return _write_per_row(buffer, update, index, axis)
    start = [0] * len(buffer.shape)
    start[axis] = index
    return ops.slice_update(buffer, start, update)


def _write_per_row(buffer, update, index, axis: int):
    """`write_at` with a position per row: only the new positions are written, however long the buffer is."""
    if keras.config.backend() == "jax":
        import jax

        return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis - 1))(
            buffer, update, index
        )
    rows = ops.arange(buffer.shape[0], dtype="int32")
    places = [rows, ops.cast(index, "int32")]
    if axis == 2:
        heads = buffer.shape[1]
        places = [ops.repeat(x, heads) for x in places]
        places.insert(1, ops.tile(ops.arange(heads, dtype="int32"), buffer.shape[0]))
    update = ops.reshape(update, (-1, *buffer.shape[axis + 1 :]))
    return ops.scatter_update(buffer, ops.stack(places, axis=1), update)
