"""The chunked loss on several JAX devices: each takes its own tokens, and the table's gradients are summed once.

Without this, XLA sums the table's gradient over the devices after each chunk: gigabytes, a hundred times per step.
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
    """`reference.sums_and_gradients` with the tokens of a chunk spread over the devices.

    Args:
        token_loss: a `CrossEntropy`, or an object with its methods.
        targets: `(by_token, shared)` as in `chunk_targets`.
        x: hidden states [C, m, D], in the compute dtype.
        table: the projection [V, D].
        train_table: whether the table's gradient is needed.

    Returns:
        `(sums, x_gradient)` or `(sums, x_gradient, table_gradient)`.
    """
    axis, count = devices_of_a_batch()
    if count == 1 or x.shape[1] % count:
        return reference.sums_and_gradients(token_loss, targets, x, table, train_table)
    # Each device keeps its columns of the sum. If the weight is fully sharded, these are the weight's own columns.
    by_columns = table.shape[1] % count == 0

    def on_device(by_token, shared, x, table):
        sums, x_gradient, *gradient = reference.sums_and_gradients(
            token_loss, (by_token, shared), x, table, train_table
        )
        if by_columns:
            gradient = [jax.lax.psum_scatter(part, axis, scatter_dimension=1, tiled=True) for part in gradient]
        else:
            gradient = [jax.lax.psum(part, axis) for part in gradient]
        return jax.lax.psum(sums, axis), x_gradient, *gradient

    replicated, second_axis = PartitionSpec(), PartitionSpec(None, axis)
    mapped = jax.shard_map(
        on_device,
        mesh=keras.distribution.distribution().device_mesh.backend_mesh,
        in_specs=(second_axis, replicated, second_axis, replicated),
        out_specs=(replicated, second_axis, *([second_axis if by_columns else replicated] if train_table else [])),
        axis_names={axis},
        check_vma=False,
    )
    # Without the barrier, the backward pass might begin while each device still holds the table's whole gradient.
    return materialized(mapped(*targets, x, ops.cast(table, x.dtype)))
