"""Tensors that are to be in memory as they are, whatever reads them."""

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
