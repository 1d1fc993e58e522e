"""Learning rates: one recommendation per optimizer and width, a schedule, and a rate that callbacks may set."""

import math
import statistics

import keras
from keras import ops

from keras_t5gemma.caller_warnings import warn_caller

# Peak rates by the model's width D: `factor / D**power`, and at most the last number. The best of a grid for widths of
# 64, 128 and 256 (benchmarks/log/2026-11-29-learning-rates-by-width.md), extrapolated to published widths as in
# arXiv 2203.03466: AdamW's rate is proportional to 1/D. Adafactor's is relative to the size of a weight, which is
# proportional to 1/sqrt(D).
_RULES = {
    "adamw": {"full": (0.1, 1.0, 2e-3), "lora": (2.5, 1.0, 1e-2)},
    "adafactor": {"full": (0.1, 0.5, 1e-2), "lora": (0.35, 0.5, 3e-2)},
    "muon": {"full": (0.1, 1.0, 2e-3), "lora": (2.5, 1.0, 1e-2)},
}
_USUAL_WIDTH = 2304  # of Gemma 2 2B, as long as the model is unknown


def rate_by_width(name: str, what: str, width: float) -> float:
    """The default learning rate of an optimizer.

    Args:
        name: "adamw", "adafactor" or "muon".
        what: "full", or "lora" if only LoRA's factors are trained.
        width: D.

    Returns:
        The peak rate.
    """
    factor, power, most = _RULES[name][what]
    return min(most, factor / width**power)


def recommended_learning_rate(name: str, variables: list) -> float:
    """The default learning rate of an optimizer for a model.

    Args:
        name: as for `rate_by_width`.
        variables: the trainable `keras.Variable`s. If a factor of LoRA is among them, the rate is LoRA's. The width is
            the median of the matrices' numbers of inputs.
    """
    kinds = [variable.path.rpartition("/")[2] for variable in variables]
    lora = any(kind.startswith("lora_") for kind in kinds)
    inputs = [
        variable.shape[0]
        for variable, kind in zip(variables, kinds, strict=True)
        if len(variable.shape) == 2 and not kind.endswith(("embeddings", "lora_kernel_b"))
    ]
    return rate_by_width(name, "lora" if lora else "full", statistics.median(inputs) if inputs else _USUAL_WIDTH)


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A linear warm-up from zero to a peak, then a cosine down to a fraction of the peak.

    Args:
        peak: the rate after the warm-up; None for the optimizer's default, which the optimizer sets in `build`.
        steps: the step at which the cosine ends; None to stay at the peak after the warm-up.
        warmup_steps: steps of the warm-up.
        final_fraction: the fraction of the peak after the cosine.
    """

    def __init__(
        self,
        peak: float | None = None,
        steps: int | None = None,
        warmup_steps: int = 0,
        final_fraction: float = 0.1,
    ):
        self.peak, self.steps, self.warmup_steps, self.final_fraction = peak, steps, warmup_steps, final_fraction
        self.default_peak = None

    def __call__(self, step):
        """The rate of a step, a float32 scalar."""
        step = ops.cast(step, "float32")
        peak = self.default_peak if self.peak is None else self.peak
        rate = ops.full((), peak, "float32")
        if self.steps is not None:
            progress = ops.clip((step - self.warmup_steps) / max(1, self.steps - self.warmup_steps), 0.0, 1.0)
            cosine = 0.5 * (1 + ops.cos(math.pi * progress))
            rate = rate * (self.final_fraction + (1 - self.final_fraction) * cosine)
        if self.warmup_steps:
            rate = ops.where(step < self.warmup_steps, peak * step / self.warmup_steps, rate)
        return rate

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {
            "peak": self.peak,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "final_fraction": self.final_fraction,
        }


class DefaultLearningRate:
    """A mix-in before a Keras optimizer: a default learning rate, which can be set even if it follows a schedule.

    Keras's `LearningRateScheduler` and `ReduceLROnPlateau` set `optimizer.learning_rate`, which Keras refuses for a
    schedule. Here the rate stays at the value that was set, unless that equals the schedule's rate at this step. The
    value is part of the optimizer's state: a run that resumes from a checkpoint keeps it. During the warm-up, a warning
    says that the rate, which is still small, would stay to the end of the run.

    Args:
        learning_rate: a float, a schedule or a function, as for Keras; None for `recommended_learning_rate`, which is
            determined in `build`, when the trainable variables are known.
        *args: arguments of the Keras optimizer.
        **kwargs: arguments of the Keras optimizer.
    """

    recommendation = None  # the name for `rate_by_width`

    def __init__(self, learning_rate=None, *args, **kwargs):
        super().__init__(
            rate_by_width(self.recommendation, "full", _USUAL_WIDTH) if learning_rate is None else learning_rate,
            *args,
            **kwargs,
        )
        self._has_default_rate = learning_rate is None
        self._set_rate, self._has_warned = None, False
        if isinstance(self._learning_rate, WarmupCosine):
            self._learning_rate.default_peak = rate_by_width(self.recommendation, "full", _USUAL_WIDTH)
        if isinstance(self._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            self._set_rate = self.add_variable(
                (), keras.initializers.Constant(-1.0), "float32", "only_first_replica", name="set_learning_rate"
            )

    def build(self, variables: list) -> None:
        """Builds the optimizer, and sets the default rate for these variables."""
        if self.built:
            return
        super().build(variables)
        if self._has_default_rate:
            self._learning_rate.assign(recommended_learning_rate(self.recommendation, variables))
        elif isinstance(self._learning_rate, WarmupCosine):
            self._learning_rate.default_peak = recommended_learning_rate(self.recommendation, variables)

    @property
    def learning_rate(self):
        """The rate of the next step."""
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, value):
        is_schedule = callable(value) and not isinstance(value, keras.Variable)
        if self._set_rate is not None and not is_schedule:
            follows = float(ops.convert_to_numpy(self._set_rate.value)) < 0
            if follows and float(value) == float(ops.convert_to_numpy(self.learning_rate)):
                return
            self._warn_of_warm_up(float(value))
        if self._set_rate is not None:
            self._set_rate.assign(-1.0 if is_schedule else value)
        if self._set_rate is None or is_schedule:
            keras.optimizers.Optimizer.learning_rate.fset(self, value)

    def _warn_of_warm_up(self, value: float) -> None:
        """Warns, once per optimizer, if the rate is set during the warm-up."""
        if self._has_warned:
            return
        steps = getattr(self._learning_rate, "warmup_steps", 0)
        step = int(ops.convert_to_numpy(self.iterations.value))
        if step < steps:
            self._has_warned = True
            warn_caller(
                f"The learning rate was set to {value:g} at step {step}, within the warm-up of {steps} steps. It ends "
                f"the schedule: the rate stays {value:g} until it is set again. With callbacks that set the rate, use "
                f"`kt.optimizer(..., warmup_steps=0)`."
            )

    def _get_current_learning_rate(self):
        rate = super()._get_current_learning_rate()
        if self._set_rate is None:
            return rate
        set_rate = ops.convert_to_tensor(self._set_rate)
        return ops.where(set_rate < 0, rate, set_rate)

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {**super().get_config(), **({"learning_rate": None} if self._has_default_rate else {})}
