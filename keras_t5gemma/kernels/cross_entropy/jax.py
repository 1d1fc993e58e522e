"""The chunked loss over several devices of JAX: each takes the tokens it holds, and the table's gradients meet once.

Left to itself, XLA sums the table's gradient over the devices after each chunk: gigabytes, a hundred times a step.
"""

import jax
import keras
from jax.sharding import PartitionSpec
from keras import ops

from keras_t5gemma.kernels.barriers import materialized
from keras_t5gemma.kernels.cross_entropy import reference
from keras_t5gemma.kernels.cross_entropy.reference import scaled, tensor_of  # noqa: F401 the rest of the interface
from keras_t5gemma.kernels.device import devices_of_a_batch


def sums_and_gradients(token_loss, targets, x, table, train_table):
    """As `reference.sums_and_gradients`, the tokens of a chunk spread over the devices."""
    axis, count = devices_of_a_batch()
    if count == 1 or x.shape[1] % count:
        return reference.sums_and_gradients(token_loss, targets, x, table, train_table)
    # Each device is left with its columns of the sum, which are those of the weight where it is fully sharded.
    by_columns = table.shape[1] % count == 0

    def of_device(by_token, shared, x, table):
        sums, x_gradient, *gradient = reference.sums_and_gradients(
            token_loss, (by_token, shared), x, table, train_table
        )
        if by_columns:
            gradient = [jax.lax.psum_scatter(part, axis, scatter_dimension=1, tiled=True) for part in gradient]
        else:
            gradient = [jax.lax.psum(part, axis) for part in gradient]
        return jax.lax.psum(sums, axis), x_gradient, *gradient

    whole, tokens = PartitionSpec(), PartitionSpec(None, axis)
    mapped = jax.shard_map(
        of_device,
        mesh=keras.distribution.distribution().device_mesh.backend_mesh,
        in_specs=(tokens, whole, tokens, whole),
        out_specs=(whole, tokens, *([tokens if by_columns else whole] if train_table else [])),
        axis_names={axis},
        check_vma=False,
    )
    # Settled, or the backward pass might begin while each device still holds the table's whole gradient.
    return materialized(mapped(*targets, x, ops.cast(table, x.dtype)))
