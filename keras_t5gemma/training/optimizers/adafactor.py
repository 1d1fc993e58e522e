"""Adafactor, with one row and one column of second moments per matrix, for bfloat16 weights too."""

import keras
from keras import ops

from keras_t5gemma.training.optimizers.learning_rates import DefaultLearningRate
from keras_t5gemma.training.optimizers.low_precision import Float32Weight, LowPrecision
from keras_t5gemma.training.optimizers.weight_decay import SavesExclusions


class _Factored(keras.optimizers.Adafactor):
    """Keras's Adafactor without the second moment of a matrix's own size, which Keras stores and never reads."""

    def build(self, variables: list) -> None:
        """Creates the means over each matrix's rows and columns, and the second moments of vectors."""
        if self.built:
            return
        keras.optimizers.Optimizer.build(self, variables)
        self._moments = [
            [self.add_variable(shape, dtype=variable.dtype, name=f"{variable.name}_{name}") for name, shape in shapes]
            for variable, shapes in zip(variables, map(_shapes, variables), strict=True)
        ]

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable, in its dtype.

        Args:
            gradient: its gradient.
            variable: a `keras.Variable` or a `Float32Weight`.
            learning_rate: a scalar.
        """
        dtype = keras.backend.standardize_dtype(variable.dtype)
        rate, gradient = ops.cast(learning_rate, dtype), ops.cast(gradient, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        value = variable.value if isinstance(variable, Float32Weight) else ops.convert_to_tensor(variable)
        rate = ops.minimum(rate, 1 / ops.sqrt(step))
        rate = rate * ops.maximum(ops.cast(self.epsilon_2, dtype), _rms(value))
        weight = ops.power(step, self.beta_2_decay)  # of the new gradient in the means
        squares = ops.square(gradient) + self.epsilon_1
        moments = self._moments[self._get_variable_index(variable)]
        if len(moments) == 1:
            new_moments = [(1 - weight) * moments[0] + weight * squares]
            second_moment = new_moments[0]
        else:
            new_moments = [
                (1 - weight) * moment + weight * ops.mean(squares, axis)
                for moment, axis in zip(moments, (-1, -2), strict=True)
            ]
            rows, columns = new_moments
            rows = rows / ops.mean(rows, axis=-1, keepdims=True)
            second_moment = ops.expand_dims(rows, -1) * ops.expand_dims(columns, -2)
        for moment, new_moment in zip(moments, new_moments, strict=True):
            self.assign(moment, new_moment)
        update = gradient / ops.sqrt(second_moment)
        update = update / ops.maximum(1.0, _rms(update) / self.clip_threshold)
        self.assign_sub(variable, rate * update)


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Adafactor(SavesExclusions, LowPrecision, DefaultLearningRate, _Factored):
    """`keras.optimizers.Adafactor` (arXiv 1804.04235), with the same numbers in less memory; see `LowPrecision`.

    The size of a step is the learning rate, but at most `1 / sqrt(steps so far)`, times the root mean square of the
    weight.
    """

    recommendation = "adafactor"


def _shapes(variable) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a variable's second moments."""
    shape = tuple(variable.shape)
    if len(shape) < 2:
        return [("velocity", shape)]
    return [("rows", shape[:-1]), ("columns", (*shape[:-2], shape[-1]))]


def _rms(x):
    """The root mean square of a tensor."""
    return ops.sqrt(ops.mean(ops.square(x)))
