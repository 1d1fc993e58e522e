"""Activations computed again in the backward pass rather than kept: time for memory."""

import keras
from keras import ops

from keras_t5gemma.kernels.barriers import with_gradients_materialized


def rematerialized(call, layer, *tensors):
    """Calls a function of a layer, of which nothing is kept for the backward pass but what goes in.

    The backward pass calls it again. Values of the layer's variables go in, too, and the states of its random draws
    come out, so that the second time draws what the first drew, and neither writes a variable from within what JAX
    traces on its own.

    Args:
        call: tensors to one tensor, with no other variables than the layer's.
        layer: a `keras.Layer`.
        *tensors: floating-point; gradients flow to them and to the layer's trainable variables.

    Returns:
        What `call` returns.
    """
    weights = {id(variable) for variable in layer.weights}
    trained, frozen = layer.trainable_weights, layer.non_trainable_weights
    states = [variable for variable in layer.variables if id(variable) not in weights]
    # Copies: TensorFlow hands out variables as tensors, and these are about to change.
    fixed = [*map(ops.convert_to_tensor, frozen), *map(ops.copy, states)]

    @keras.remat
    def run(*args):
        mapping = zip([*trained, *frozen, *states], [*args[len(tensors) :], *fixed], strict=True)
        with keras.StatelessScope(mapping, initialize_variables=False) as scope:
            result = call(*args[: len(tensors)])
        return result, *(scope.get_current_value(state) for state in states)

    result, *after = run(*with_gradients_materialized([*tensors, *map(ops.convert_to_tensor, trained)]))
    for state, value in zip(states, after, strict=True):
        state.assign(value)
    return result


def recomputed(call, *tensors):
    """Calls a function of elementwise steps and sums, such as a norm, of which only what goes in is worth keeping.

    XLA makes one pass of it by itself. TensorFlow would keep each step's result for the backward pass; there they are
    made again.

    Args:
        call: tensors to one tensor, without variables.
        *tensors: floating-point.

    Returns:
        What `call` returns.
    """
    if keras.config.backend() != "tensorflow":
        return call(*tensors)
    import tensorflow as tf

    return tf.recompute_grad(call)(*tensors)
