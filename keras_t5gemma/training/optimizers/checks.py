"""Checks that an optimizer can move the weights it is given."""

import math

import keras
import numpy as np
from keras import ops

from keras_t5gemma._keras_internals import variable_array
from keras_t5gemma.training.optimizers.indexed_slices import is_distributed
from keras_t5gemma.training.optimizers.low_precision import LowPrecision, is_bfloat16

# Steps of a trial, and the part of float32's way below which training would come to nothing.
_STEPS = 20
_LEAST_SHARE = 0.5
_TYPICAL_WEIGHT = 0.02


def check_optimizer(optimizer, variables):
    """Raises where training would leave weights as they are.

    An optimizer that is not of this package's `LowPrecision` ones is tried on two small variables, in float32 and in
    bfloat16, with random gradients whose norm over all weights is 1. Keras's Adam fails at any rate, because its
    `beta_2` is 1 in bfloat16; others by a rate whose steps are less than half a unit in the last place.

    Args:
        optimizer: a `keras.optimizers.Optimizer`.
        variables: the trainable `keras.Variable`s.

    Raises:
        ValueError: if a variable is float16, or if one is bfloat16 and the optimizer hardly moves such; the message
            names the optimizer, the dtype and what would work.
    """
    _check_no_float16(variables)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(optimizer, LowPrecision) or not any(is_bfloat16(variable) for variable in variables):
        return
    found, cause = _finding(optimizer, sum(math.prod(variable.shape) for variable in variables))
    if found is not None:
        raise ValueError(
            f"The optimizer {type(optimizer).__name__} does not train bfloat16 weights: {found}. Compile with "
            f'`optimizer="auto"` or `keras_t5gemma.optimizer(...)`, which keep moments in float32 and round '
            f'stochastically, or make the model with `dtype="mixed_bfloat16"`, whose weights are float32.'
        ) from cause


def _check_no_float16(variables):
    """Raises for weights that no optimizer trains.

    Args:
        variables: the trainable `keras.Variable`s.

    Raises:
        ValueError: if one is float16; the message names the remedy.
    """
    for variable in variables:
        if keras.backend.standardize_dtype(variable.dtype) == "float16":
            raise ValueError(
                f"float16 weights cannot be trained: most steps are smaller than what float16 can add to a weight, and "
                f'gradients vanish. Make the model with `dtype="mixed_float16"` or "mixed_bfloat16", whose weights are '
                f'float32, with "bfloat16", or add LoRA with `enable_lora`. Received: {variable.path}, float16.'
            )


def _finding(optimizer, count):
    """`(what was found, exception or None)`; what was found is None if the optimizer trains."""
    if is_distributed():
        return "it computes in their dtype, in which small steps are lost", None
    try:
        config = {
            **optimizer.get_config(),
            "gradient_accumulation_steps": None,
            "learning_rate": _largest_rate(optimizer),
        }
        trials = {dtype: type(optimizer).from_config(dict(config)) for dtype in ("float32", "bfloat16")}
    except (TypeError, ValueError, KeyError, NotImplementedError):
        return None, None  # one that cannot be made anew cannot be tried
    ways = {"float32": _way(trials["float32"], "float32", count**-0.5)}
    try:
        ways["bfloat16"] = _way(trials["bfloat16"], "bfloat16", count**-0.5)
    except Exception as error:
        return f"its step ends in {type(error).__name__}", error
    share = min(
        float(np.linalg.norm(moved) / max(np.linalg.norm(expected), 1e-30))
        for moved, expected in zip(ways["bfloat16"], ways["float32"], strict=True)
    )
    if share >= _LEAST_SHARE:
        return None, None
    rate = config["learning_rate"]
    return f"at a learning rate of {rate:g} it takes them {share:.0%} of the way that float32 weights go", None


def _largest_rate(optimizer):
    """Of the first steps and of later ones: a schedule may begin with a warm-up."""
    schedule = optimizer._learning_rate
    if not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        return float(variable_array(optimizer.learning_rate))
    return max(float(ops.convert_to_numpy(schedule(step))) for step in (0, *(10**power for power in range(6))))


def _way(optimizer, dtype, gradient_size):
    """How far two variables go, a matrix and a vector."""
    draw = np.random.default_rng(0)
    shapes = ((32, 32), (32,))
    weights = [
        keras.Variable(draw.normal(0, _TYPICAL_WEIGHT, shape), dtype=dtype, trainable=True, name=name)
        for shape, name in zip(shapes, ("kernel", "scale"), strict=True)
    ]
    before = [_array(weight) for weight in weights]
    for _ in range(_STEPS):
        gradients = [ops.convert_to_tensor(draw.normal(0, gradient_size, shape), dtype) for shape in shapes]
        optimizer.apply(gradients, weights)
    return [_array(weight) - start for weight, start in zip(weights, before, strict=True)]


def _array(variable):
    return np.array(ops.convert_to_numpy(ops.cast(variable, "float32")))
