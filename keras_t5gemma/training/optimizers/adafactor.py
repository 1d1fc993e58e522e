"""Adafactor, with one row and one column of second moments per matrix, for bfloat16 weights too."""

import keras
from keras import ops

from keras_t5gemma.training.optimizers.learning_rates import DefaultLearningRate
from keras_t5gemma.training.optimizers.low_precision import Float32Weight, LowPrecision
from keras_t5gemma.training.optimizers.weight_decay import SavesExclusions


class _Factored(keras.optimizers.Adafactor):
    """Keras's numbers without the second moment of a matrix's own size that Keras stores and never reads again."""

    def build(self, variables):
        """Makes the means over each matrix's rows and columns, and the second moments of vectors."""
        if self.built:
            return
        keras.optimizers.Optimizer.build(self, variables)
        self._moments = [
            [self.add_variable(shape, dtype=variable.dtype, name=f"{variable.name}_{name}") for name, shape in shapes]
            for variable, shapes in zip(variables, map(_shapes, variables), strict=True)
        ]

    def update_step(self, gradient, variable, learning_rate):
        """One variable's step, in its dtype."""
        dtype = keras.backend.standardize_dtype(variable.dtype)
        rate, gradient = ops.cast(learning_rate, dtype), ops.cast(gradient, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        value = variable.value if isinstance(variable, Float32Weight) else ops.convert_to_tensor(variable)
        rate = ops.minimum(rate, 1 / ops.sqrt(step))
        rate = rate * ops.maximum(ops.cast(self.epsilon_2, dtype), _rms(value))
        share = ops.power(step, self.beta_2_decay)  # of the new gradient
        squares = ops.square(gradient) + self.epsilon_1
        moments = self._moments[self._get_variable_index(variable)]
        if len(moments) == 1:
            new = [(1 - share) * moments[0] + share * squares]
            second = new[0]
        else:
            new = [
                (1 - share) * moment + share * ops.mean(squares, axis)
                for moment, axis in zip(moments, (-1, -2), strict=True)
            ]
            rows = new[0] / ops.mean(new[0], axis=-1, keepdims=True)
            second = ops.expand_dims(rows, -1) * ops.expand_dims(new[1], -2)
        for moment, moved in zip(moments, new, strict=True):
            self.assign(moment, moved)
        update = gradient / ops.sqrt(second)
        update = update / ops.maximum(1.0, _rms(update) / self.clip_threshold)
        self.assign_sub(variable, rate * update)


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Adafactor(SavesExclusions, LowPrecision, DefaultLearningRate, _Factored):
    """`keras.optimizers.Adafactor` (arXiv 1804.04235), with the same numbers in less memory; see `LowPrecision`.

    A step is the learning rate, at most one over the root of the steps so far, times the root mean square of a weight.
    """

    recommendation = "adafactor"


def _shapes(variable):
    shape = tuple(variable.shape)
    if len(shape) < 2:
        return [("velocity", shape)]
    return [("rows", shape[:-1]), ("columns", (*shape[:-2], shape[-1]))]


def _rms(x):
    return ops.sqrt(ops.mean(ops.square(x)))
