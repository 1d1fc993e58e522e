"""Rematerialization: recomputes activations in the backward pass instead of storing them."""

import contextlib
import contextvars
from collections.abc import Iterator

import keras
from keras import ops

from keras_t5gemma.kernels.barriers import with_gradients_materialized

_HAS_BACKWARD_PASS = contextvars.ContextVar("has_backward_pass", default=True)


@contextlib.contextmanager
def forward_only() -> Iterator[None]:
    """A context in which programs are traced that never have a backward pass: exported ones, on TensorFlow.

    Otherwise each use of `recomputed` is a function of its own in the program, with a gradient that cannot be saved.
    """
    token = _HAS_BACKWARD_PASS.set(False)
    try:
        yield
    finally:
        _HAS_BACKWARD_PASS.reset(token)


def rematerialized(call, layer, *tensors):
    """Calls a layer's function and stores only its inputs for the backward pass, which calls it again.

    The values of the layer's variables are inputs too, and the new states of its random generators are outputs. So the
    second call draws the same random numbers as the first. Neither call writes a variable from inside a JAX trace.

    Args:
        call: a function of tensors that returns one tensor. It uses no variables except the layer's.
        layer: a `keras.Layer`.
        *tensors: floating-point tensors. Gradients flow to them and to the layer's trainable variables.

    Returns:
        The result of `call`.
    """
    weights = {id(variable) for variable in layer.weights}
    trained, frozen = layer.trainable_weights, layer.non_trainable_weights
    states = [variable for variable in layer.variables if id(variable) not in weights]
    # Copies: TensorFlow's tensors share memory with their variables, and these are about to change.
    fixed = [*map(ops.convert_to_tensor, frozen), *map(ops.copy, states)]

    @keras.remat
    def run(*args):
        mapping = zip([*trained, *frozen, *states], [*args[len(tensors) :], *fixed], strict=True)
        with keras.StatelessScope(mapping, initialize_variables=False) as scope:
            result = call(*args[: len(tensors)])
        return result, *(scope.get_current_value(state) for state in states)

    result, *new_states = run(*with_gradients_materialized([*tensors, *map(ops.convert_to_tensor, trained)]))
    for state, value in zip(states, new_states, strict=True):
        state.assign(value)
    return result


def recomputed(call, *tensors):
    """Calls a function of elementwise steps and sums, such as a norm, and stores only its inputs.

    XLA fuses such a function into one pass by itself. TensorFlow would store the result of each step for the backward
    pass; here the backward pass recomputes them.

    Args:
        call: a function of tensors that returns one tensor and uses no variables.
        *tensors: floating-point tensors.

    Returns:
        The result of `call`.
    """
    if keras.config.backend() != "tensorflow" or not _HAS_BACKWARD_PASS.get():
        return call(*tensors)
    import tensorflow as tf

    return tf.recompute_grad(call)(*tensors)
