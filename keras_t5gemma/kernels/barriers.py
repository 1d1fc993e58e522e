"""Optimization barriers: keep a compiler from recomputing, fusing or transposing a tensor."""

import functools

import keras


def materialized(structure):
    """Identity. Each tensor is computed once and stored with its own layout, however many operations read it.

    Without this barrier, XLA carries the untransposed keys through a decoding loop and transposes them in every step.
    It also computes the exponentials of logits twice: once for their sum, and once for their gradients. PyTorch copies
    a transposed view for each product.

    Args:
        structure: a nested structure of tensors.

    Returns:
        The same structure with the same values.
    """
    if keras.config.backend() == "torch":
        return keras.tree.map_structure(lambda x: x.contiguous(), structure)
    if keras.config.backend() != "jax":
        return structure
    import jax

    return jax.lax.optimization_barrier(structure)


def with_gradients_summed_early(x):
    """Identity. In the backward pass, this reader's gradient is added to the running sum at once.

    Without it, XLA keeps one gradient of the encoder's output per decoder layer and sums them at the end. TensorFlow
    (for large tensors) and PyTorch sum early by themselves.
    """
    return materialized(x) if keras.config.backend() == "jax" else x


def with_gradients_materialized(tensors):
    """Identity. All gradients of the tensors are in memory before the backward pass continues.

    Without it, XLA on TPUs continues with the next layer and computes the gradients of the weights later. Until then it
    keeps all the activations that they need.
    """
    return _with_backward_barrier()(tensors) if keras.config.backend() == "jax" else tensors


@functools.cache
def _with_backward_barrier():
    """An identity function for JAX whose gradients pass an optimization barrier."""
    import jax

    identity = jax.custom_vjp(lambda tensors: tensors)
    identity.defvjp(lambda tensors: (tensors, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),))
    return identity
