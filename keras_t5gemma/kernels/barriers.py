"""Tensors that are to be in memory as they are, whatever reads them."""

import functools

import keras


def settled(structure):
    """The same tensors, none of which is made again, or laid out anew, by what reads it.

    XLA would carry what keys are transposed from through a decoding loop, and transpose it in every step; or make the
    exponentials of logits once for their sum and once more for their gradients. PyTorch would lay out a transposed view
    for each product.
    """
    if keras.config.backend() == "torch":
        return keras.tree.map_structure(lambda x: x.contiguous(), structure)
    if keras.config.backend() != "jax":
        return structure
    import jax

    return jax.lax.optimization_barrier(structure)


def handed_on(x):
    """The same tensor, for one reader more: its gradients are summed as they come, rather than kept for one sum.

    XLA would keep, of the encoder's output, those of all layers of the decoder. TensorFlow, where they are large, and
    PyTorch sum by themselves.
    """
    return settled(x) if keras.config.backend() == "jax" else x


def settled_backwards(tensors):
    """The same tensors, whose gradients are in memory, all of them, before any of them is used.

    XLA, on TPUs, would go on from layer to layer and leave the weights' gradients for later, and with them all that
    they are made of.
    """
    return _settled_backwards()(tensors) if keras.config.backend() == "jax" else tensors


@functools.cache
def _settled_backwards():
    import jax

    same = jax.custom_vjp(lambda tensors: tensors)
    same.defvjp(lambda tensors: (tensors, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),))
    return same
