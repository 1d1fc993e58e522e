"""Training of weights stored in bfloat16, with float32 everywhere else.

Keras's optimizers compute in the dtype of the weights. In bfloat16 `beta_2 = 0.999` is 1, so that every step of Adam is
zero, and a step smaller than half a unit in the last place is lost (8 bits: 6e-5 for a weight of 0.02).
"""

import contextlib

import keras
from keras import ops

from keras_t5gemma.training.optimizers.indexed_slices import dense, float32_gradient, is_distributed
from keras_t5gemma.training.optimizers.stochastic_rounding import (
    nearest_bfloat16,
    random_bits,
    random_key,
    stochastic_round,
)

MOMENTS_DTYPES = ("float32", "bfloat16")
# Variables that are not moments: sums and averages, in which bfloat16 would lose the summands.
_ALWAYS_FLOAT32 = ("gradient_accumulator", "average", "master_weight")


class LowPrecision:
    """A mix-in before a Keras optimizer, which then trains bfloat16 weights as it trains float32 ones.

    Moments are float32, and so is all arithmetic: clipping, gradient accumulation, weight decay and Keras's own
    formulas. The new weight is rounded to bfloat16 by `stochastic_round`, or also kept in float32. Float32 weights,
    those of LoRA and of "mixed_bfloat16" among them, are trained as by the Keras optimizer.

    Args:
        *args: arguments of the Keras optimizer.
        moments_dtype: "float32", or "bfloat16" for moments of bfloat16 weights, which are then rounded stochastically
            too. This halves their memory, and adds a noise of up to 0.8% to each moment per step.
        master_weights: whether to keep a float32 copy of each bfloat16 weight, for 4 bytes per parameter. The weight is
            then the copy rounded to the nearest, so that rounding adds no noise. If other code assigns to a weight, the
            copy restarts from the new value.
        rounding_seed: the seed of stochastic rounding, whose random numbers are a function of seed, step and variable.
        **kwargs: arguments of the Keras optimizer.

    Raises:
        ValueError: if `moments_dtype` is neither.
    """

    def __init__(
        self,
        *args,
        moments_dtype: str = "float32",
        master_weights: bool = False,
        rounding_seed: int = 0,
        **kwargs,
    ):
        if moments_dtype not in MOMENTS_DTYPES:
            expected = " or ".join(repr(name) for name in MOMENTS_DTYPES)
            raise ValueError(f"`moments_dtype` must be {expected}. Received: moments_dtype={moments_dtype!r}.")
        super().__init__(*args, **kwargs)
        self.moments_dtype = moments_dtype
        self.master_weights = bool(master_weights)
        self.rounding_seed = rounding_seed
        self._clip_scale = self._step = None  # set during an update

    def build(self, variables: list) -> None:
        """Creates the moments, float32 for bfloat16 weights, and the float32 copies.

        Args:
            variables: trainable `keras.Variable`s.
        """
        if self.built:
            return
        super().build(variables)
        self._master_weights = [
            # It starts at zero, which differs from the weight, so that `_float32_value` starts from the weight.
            self.add_variable_from_reference(variable, "master_weight")
            if self.master_weights and is_bfloat16(variable)
            else None
            for variable in variables
        ]
        # One stream of random numbers per variable.
        self._streams = {self._var_key(variable): i for i, variable in enumerate([*variables, *self.variables])}

    def add_variable(self, shape, initializer="zeros", dtype=None, *args, name=None, **kwargs):
        """Adds a variable as Keras does, but in float32 or `moments_dtype` if `dtype` is bfloat16.

        Args:
            shape: the variable's shape.
            initializer: as in Keras.
            dtype: the dtype that Keras requests, which is the weight's.
            *args: as in Keras.
            name: as in Keras; gradient accumulators, averages and master weights are always float32.
            **kwargs: as in Keras.
        """
        if dtype is not None and keras.backend.standardize_dtype(dtype) == "bfloat16":
            dtype = "float32" if (name or "").endswith(_ALWAYS_FLOAT32) else self.moments_dtype
        return super().add_variable(shape, initializer, dtype, *args, name=name, **kwargs)

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable; a bfloat16 variable in float32.

        Args:
            gradient: its gradient.
            variable: a `keras.Variable`.
            learning_rate: a scalar.
        """
        if not is_bfloat16(variable):
            super().update_step(gradient, variable, learning_rate)
            return
        learning_rate = ops.cast(learning_rate, "float32")
        weight = Float32Weight(variable, self._float32_value(variable))
        weight.value = weight.value - weight.value * (self.decay_of(variable) * learning_rate)
        gradient = dense(ops.cast(gradient, "float32"))
        if self._clip_scale is not None:
            gradient = gradient * self._clip_scale
        super().update_step(gradient, weight, learning_rate)
        self._store(variable, weight.value)

    def decay_of(self, variable) -> float:
        """The decay rate of a variable: a step shrinks it by this, times the learning rate."""
        # TensorFlow passes its own variable, which has no path; the Keras variable is found by its index.
        variable = self._trainable_variables[self._get_variable_index(variable)]
        return (self.weight_decay or 0.0) if self._use_weight_decay(variable) else 0.0

    def key_of(self, variable):
        """The key of a variable's random numbers in this step, see `random_key`."""
        step = self._iterations if self._step is None else self._step
        return random_key(self.rounding_seed, step, self._streams[self._var_key(variable)])

    def _float32_value(self, variable):
        """The value of a bfloat16 variable in float32: its master weight, if there is one that is up to date."""
        value = ops.cast(variable, "float32")
        master = self._master_weights[self._get_variable_index(variable)]
        if master is None:
            return value
        # Elements that differ were assigned by other code: a checkpoint, `CrossAttentionWarmup`, the initializer.
        master = ops.convert_to_tensor(master)
        return ops.where(ops.equal(nearest_bfloat16(master), value), master, value)

    def _store(self, variable, value) -> None:
        """Stores the new float32 value of a bfloat16 variable, and of its master weight."""
        master = self._master_weights[self._get_variable_index(variable)]
        if master is None:
            self.assign(variable, value)
        else:
            super().assign(master, value)
            super().assign(variable, ops.cast(nearest_bfloat16(value), "bfloat16"))

    def assign(self, variable, value):
        """Assigns a value; rounds stochastically if the variable is bfloat16."""
        if isinstance(variable, Float32Weight):
            variable.value = value
        elif is_bfloat16(variable):
            value = ops.cast(value, "float32")
            super().assign(variable, stochastic_round(value, random_bits(value.shape, self.key_of(variable))))
        else:
            super().assign(variable, value)

    def assign_add(self, variable, value):
        """Adds to a variable; the sum is computed in float32, see `assign`."""
        if isinstance(variable, Float32Weight) or is_bfloat16(variable):
            self.assign(variable, _value(variable) + value)
        else:
            super().assign_add(variable, value)

    def assign_sub(self, variable, value):
        """Subtracts from a variable; the difference is computed in float32, see `assign`."""
        if isinstance(variable, Float32Weight) or is_bfloat16(variable):
            self.assign(variable, _value(variable) - value)
        else:
            super().assign_sub(variable, value)

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "moments_dtype": self.moments_dtype,
            "master_weights": self.master_weights,
            "rounding_seed": self.rounding_seed,
        }

    # The methods below override private methods of Keras 3.15.1.

    def _var_key(self, variable):
        return super()._var_key(variable.stored if isinstance(variable, Float32Weight) else variable)

    def _backend_apply_gradients(self, grads, trainable_variables):
        are_summed = self.gradient_accumulation_steps or is_distributed()
        if are_summed and any(is_bfloat16(variable) for variable in trainable_variables):
            grads = [ops.cast(grad, "float32") for grad in grads]
        super()._backend_apply_gradients(grads, trainable_variables)

    def _clip_gradients(self, grads):
        if not any(is_bfloat16(grad) for grad in grads):
            return super()._clip_gradients(grads)
        if self.global_clipnorm:
            return grads  # each update applies the factor: float32 copies of all would take twice the gradients' memory
        return super()._clip_gradients([float32_gradient(grad) for grad in grads])

    def _apply_weight_decay(self, variables):
        if others := [variable for variable in variables if not is_bfloat16(variable)]:
            super()._apply_weight_decay(others)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """Updates all variables, with the clipping factor and the step's number set for `update_step`.

        Args:
            grads: one gradient per variable.
            trainable_variables: `keras.Variable`s.
            learning_rate: a scalar.
        """
        if not any(is_bfloat16(variable) for variable in trainable_variables):
            self._update_all(grads, trainable_variables, learning_rate)
            return
        scale = None
        if self.global_clipnorm and any(is_bfloat16(grad) for grad in grads):
            scale = self.global_clipnorm / ops.maximum(_global_norm(grads), self.global_clipnorm)
            grads = [grad if is_bfloat16(grad) else grad * scale for grad in grads]
        # On PyTorch the step's number is read once, so that random keys are computed without launching kernels.
        step = int(self._iterations) if keras.config.backend() == "torch" else None
        with self._update_of(scale, step):
            self._update_all(grads, trainable_variables, learning_rate)

    def _update_all(self, grads, variables, learning_rate):
        super()._backend_update_step(grads, variables, learning_rate)

    @contextlib.contextmanager
    def _update_of(self, scale, step: int | None):
        """Sets the clipping factor and the step's number during one update."""
        self._clip_scale, self._step = scale, step
        try:
            yield
        finally:
            self._clip_scale = self._step = None

    def _update_model_variables_moving_average(self, trainable_variables):
        if not any(is_bfloat16(variable) for variable in trainable_variables):
            super()._update_model_variables_moving_average(trainable_variables)
            return
        momentum = ops.where(ops.equal(self.iterations, 0), 0.0, self.ema_momentum)
        for variable, average in zip(trainable_variables, self._model_variables_moving_average, strict=True):
            average.assign(momentum * average + (1 - momentum) * ops.cast(variable, "float32"))

    def _overwrite_model_variables_with_average_value(self, trainable_variables):
        if not any(is_bfloat16(variable) for variable in trainable_variables):
            super()._overwrite_model_variables_with_average_value(trainable_variables)
            return
        for variable, average in zip(trainable_variables, self._model_variables_moving_average, strict=True):
            variable.assign(ops.cast(average, variable.dtype))


class Float32Weight:
    """Stands for a bfloat16 variable in an update step: a float32 value, until the new value is stored.

    Args:
        stored: the variable.
        value: its value, a float32 tensor.
    """

    dtype = "float32"

    def __init__(self, stored, value):
        self.stored, self.value = stored, value
        self.shape = value.shape


def is_bfloat16(array) -> bool:
    """Whether a variable, a tensor or a gradient is bfloat16."""
    return keras.backend.standardize_dtype(array.dtype) == "bfloat16"


def _value(variable):
    """The float32 value of a variable."""
    return variable.value if isinstance(variable, Float32Weight) else ops.cast(variable, "float32")


def _global_norm(grads):
    """The norm of all gradients together, float32."""
    return ops.sqrt(sum(_squared_norm(grad) for grad in grads))


def _squared_norm(grad):
    """The sum of the squares of a gradient, float32."""
    if keras.config.backend() == "torch":
        import torch

        # It sums in float32 without a float32 copy.
        return torch.linalg.vector_norm(grad, dtype=torch.float32) ** 2
    grad = float32_gradient(grad)
    return ops.sum(ops.square(getattr(grad, "values", grad)))  # `values` are the rows of a lookup's gradient
