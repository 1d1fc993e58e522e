"""Optimization barriers: keep a compiler from recomputing, fusing or transposing a tensor."""

import functools

import keras


def materialized(structure):
    """The same tensors, each computed once and kept in memory as it is, whatever reads it.

    Without it, XLA carries the untransposed keys through a decoding loop and transposes them in every step, or computes
    the exponentials of logits once for their sum and once more for their gradients. PyTorch copies a transposed view
    for each product.

    Args:
        structure: tensors, nested.
    """
    if keras.config.backend() == "torch":
        return keras.tree.map_structure(lambda x: x.contiguous(), structure)
    if keras.config.backend() != "jax":
        return structure
    import jax

    return jax.lax.optimization_barrier(structure)


def with_gradients_summed_early(x):
    """The same tensor, for one more reader, whose gradient is added to the running sum as soon as it exists.

    Without it, XLA keeps one gradient of the encoder's output per decoder layer, and sums them at the end. TensorFlow
    (for large tensors) and PyTorch sum early by themselves.
    """
    return materialized(x) if keras.config.backend() == "jax" else x


def with_gradients_materialized(tensors):
    """The same tensors. All of their gradients are in memory before the backward pass goes on.

    Without it, XLA on TPUs goes on to the next layer and leaves the gradients of the weights for later, and keeps all
    the activations that they need.
    """
    return _with_backward_barrier()(tensors) if keras.config.backend() == "jax" else tensors


@functools.cache
def _with_backward_barrier():
    import jax

    same = jax.custom_vjp(lambda tensors: tensors)
    same.defvjp(lambda tensors: (tensors, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),))
    return same
