"""Functions in `keras.ops` as TensorFlow functions with the model's weights as variables: on JAX and TensorFlow.

On TensorFlow they are traced; on JAX, `jax2tf` converts them. The size of the batch is unknown to both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

BACKENDS = ("jax", "tensorflow")


def as_tensorflow(model: Any) -> tuple[list, Callable[[Callable, list[int]], Callable]]:
    """What converts functions of a model.

    Args:
        model: a `keras.Model`, whose variables the functions read.

    Returns:
        `(variables, convert)`: `tf.Variable`s with the model's weights, and
        `convert(function, lengths) -> tf function` for a function of int32 arrays with these lengths.
    """
    return {"jax": _from_jax, "tensorflow": _from_tensorflow}[keras.config.backend()](model)


def _from_tensorflow(model):
    return [variable.value for variable in model.variables], lambda function, _: function


def _from_jax(model):
    import tensorflow as tf
    from jax.experimental import jax2tf

    ours = model.variables
    theirs = [tf.Variable(keras.ops.convert_to_numpy(variable), trainable=False) for variable in ours]

    def convert(function, lengths):
        def stateless(values, *arrays):
            with keras.StatelessScope(state_mapping=list(zip(ours, values, strict=True))):
                return function(*arrays)

        fixed = [", ".join(map(str, variable.shape)) for variable in ours]
        shapes = [[f"({shape})" if shape else None for shape in fixed], *(f"(batch, {n})" for n in lengths)]
        converted = jax2tf.convert(stateless, polymorphic_shapes=shapes, with_gradient=False)
        return lambda *arrays: converted(theirs, *arrays)

    return theirs, convert
