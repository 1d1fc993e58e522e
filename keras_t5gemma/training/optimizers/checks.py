"""Checks that an optimizer can move the weights of a model."""

import math

import keras
import numpy as np
from keras import ops

from keras_t5gemma._keras_internals import flatten_layers, variable_array
from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.training.optimizers.indexed_slices import is_distributed
from keras_t5gemma.training.optimizers.low_precision import LowPrecision, is_bfloat16

# Steps of a trial. A bfloat16 trial fails if its weights move less than this share of the float32 trial's distance.
_STEPS = 20
_LEAST_SHARE = 0.5
_TYPICAL_WEIGHT = 0.02


def check_optimizer(optimizer: keras.optimizers.Optimizer, variables: list) -> None:
    """Checks that training would move the weights.

    An optimizer without this package's `LowPrecision` is tried on two small variables, in float32 and in bfloat16, with
    random gradients whose norm over all weights is 1. Keras's Adam fails at any learning rate, because its `beta_2` is
    1 in bfloat16. Others fail if the learning rate makes their steps smaller than half a unit in the last place.

    Args:
        optimizer: a `keras.optimizers.Optimizer`.
        variables: the trainable `keras.Variable`s.

    Raises:
        ValueError: if a variable is float16, or if one is bfloat16 and the optimizer hardly moves bfloat16 weights; the
            message names the optimizer, the dtype and the remedy.
    """
    _check_no_float16(variables)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(optimizer, LowPrecision) or not any(is_bfloat16(variable) for variable in variables):
        return
    defect, cause = _defect(optimizer, sum(math.prod(variable.shape) for variable in variables))
    if defect is not None:
        raise ValueError(
            f"The optimizer {type(optimizer).__name__} does not train bfloat16 weights: {defect}. Compile with "
            f'`optimizer="auto"` or `keras_t5gemma.optimizer(...)`, which keep moments in float32 and round '
            f'stochastically, or make the model with `dtype="mixed_bfloat16"`, whose weights are float32.'
        ) from cause


def warn_of_quantized_weights(model: keras.Model) -> None:
    """Warns if `fit` would train little more than norms, because quantized weights are not trained."""
    layers = [layer for layer in flatten_layers(model) if getattr(layer, "quantization_mode", None)]
    if not layers or any(getattr(layer, "lora_enabled", False) for layer in layers):
        return
    rest = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    warn_caller(
        f"Quantized weights are not trained: `fit` changes {rest:,} numbers in other layers, such as norms. Call "
        f"`enable_lora` on the backbone first to train LoRA on top of quantized weights."
    )


def _check_no_float16(variables: list) -> None:
    """Checks that no weight is float16, which no optimizer can train.

    Args:
        variables: the trainable `keras.Variable`s.

    Raises:
        ValueError: if a weight is float16; the message names the remedy.
    """
    for variable in variables:
        if keras.backend.standardize_dtype(variable.dtype) == "float16":
            raise ValueError(
                f"float16 weights cannot be trained: most steps are smaller than what float16 can add to a weight, and "
                f'gradients vanish. Make the model with `dtype="mixed_float16"` or "mixed_bfloat16", whose weights are '
                f'float32, with "bfloat16", or add LoRA with `enable_lora`. Received: {variable.path}, float16.'
            )


def _defect(optimizer: keras.optimizers.Optimizer, count: int) -> tuple[str | None, Exception | None]:
    """Tries an optimizer on bfloat16 weights.

    Args:
        optimizer: the optimizer, of which copies are tried.
        count: the number of trainable weights, which determines the size of a gradient.

    Returns:
        `(defect, cause)`: why the optimizer does not train such weights, None if it does or cannot be tried; and the
        exception behind it, if there is one.
    """
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
        return None, None  # an optimizer that cannot be copied cannot be tried
    float32 = _displacements(trials["float32"], "float32", count**-0.5)
    try:
        bfloat16 = _displacements(trials["bfloat16"], "bfloat16", count**-0.5)
    except Exception as error:
        return f"its step raises {type(error).__name__}", error
    share = min(
        float(np.linalg.norm(actual) / max(np.linalg.norm(expected), 1e-30))
        for actual, expected in zip(bfloat16, float32, strict=True)
    )
    if share >= _LEAST_SHARE:
        return None, None
    rate = config["learning_rate"]
    return f"at a learning rate of {rate:g} it moves them by {share:.0%} of the distance of float32 weights", None


def _largest_rate(optimizer: keras.optimizers.Optimizer) -> float:
    """The largest learning rate over the first and later steps, because a schedule may begin with a warm-up."""
    schedule = optimizer._learning_rate
    if not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        return float(variable_array(optimizer.learning_rate))
    return max(float(ops.convert_to_numpy(schedule(step))) for step in (0, *(10**power for power in range(6))))


def _displacements(optimizer: keras.optimizers.Optimizer, dtype: str, gradient_size: float) -> list[np.ndarray]:
    """Takes `_STEPS` steps with two variables, a matrix and a vector.

    Args:
        optimizer: a new optimizer.
        dtype: of the variables.
        gradient_size: standard deviation of a gradient's elements.

    Returns:
        The difference of each variable to its start, float32.
    """
    rng = np.random.default_rng(0)
    shapes = ((32, 32), (32,))
    weights = [
        keras.Variable(rng.normal(0, _TYPICAL_WEIGHT, shape), dtype=dtype, trainable=True, name=name)
        for shape, name in zip(shapes, ("kernel", "scale"), strict=True)
    ]
    before = [_array(weight) for weight in weights]
    for _ in range(_STEPS):
        gradients = [ops.convert_to_tensor(rng.normal(0, gradient_size, shape), dtype) for shape in shapes]
        optimizer.apply(gradients, weights)
    return [_array(weight) - start for weight, start in zip(weights, before, strict=True)]


def _array(variable) -> np.ndarray:
    """A variable's value in float32."""
    return np.array(ops.convert_to_numpy(ops.cast(variable, "float32")))
