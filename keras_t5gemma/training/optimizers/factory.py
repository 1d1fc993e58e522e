"""The optimizer of an adaptation run: schedule, clipping and weight decay as in the papers."""

from collections.abc import Sequence

import keras

from keras_t5gemma.checks import integer, is_number
from keras_t5gemma.suggestions import check_choice
from keras_t5gemma.training.optimizers.adafactor import Adafactor
from keras_t5gemma.training.optimizers.adamw import AdamW
from keras_t5gemma.training.optimizers.learning_rates import WarmupCosine
from keras_t5gemma.training.optimizers.muon import Muon

# Weights that are not factors of matrix products are not decayed: norms, and embeddings, whose rows are rarely updated.
NO_DECAY = ("scale", "embeddings")
WARMUP_STEPS = 100
OPTIMIZERS = {
    "adamw": AdamW,
    "adafactor": Adafactor,
    "muon": Muon,
}


def optimizer(
    name: str = "adamw",
    *,
    learning_rate: float | None = None,
    steps: int | None = None,
    warmup_steps: int | None = None,
    final_fraction: float = 0.1,
    weight_decay: float = 0.01,
    no_decay: Sequence[str] = NO_DECAY,
    clip_norm: float | None = 1.0,
    **kwargs,
) -> keras.optimizers.Optimizer:
    """A Keras optimizer with a warm-up, a cosine, clipping by the global norm and weight decay.

    A linear warm-up of 100 steps, then a cosine, and gradients clipped at a global norm of 1 are T5Gemma 2's (arXiv
    2512.14856). The cosine's end at a tenth of the peak and the weight decay are common choices, which the paper does
    not name.

        lm.compile(optimizer=optimizer("adamw", learning_rate=1e-4, steps=10_000))

    Weights in bfloat16 are trained too, with moments and all arithmetic in float32. Keras's callbacks may set
    `learning_rate`, which ends the schedule.

    Args:
        name: "adamw"; "adafactor", which keeps one row and one column of second moments per matrix; or "muon", which
            updates matrices by Newton-Schulz steps and embeddings and norms by AdamW.
        learning_rate: the peak, reached after the warm-up; None for the optimizer's default for the model's width,
            which is another one for LoRA; see `rate_by_width`.
        steps: the total number of optimizer steps, at which the cosine ends. None for no cosine: the rate stays at the
            peak.
        warmup_steps: steps of the linear warm-up from zero; at most `steps`. None for 100, or a tenth of `steps` if
            that is less.
        final_fraction: the fraction of the peak at which the cosine ends.
        weight_decay: a step shrinks weights by `learning_rate * weight_decay`.
        no_decay: a weight with one of these strings in its name is not decayed.
        clip_norm: the largest global norm of the gradients; None for no clipping.
        **kwargs: further arguments of the optimizer's class, e.g. `beta_2`; and for bfloat16 weights
            `moments_dtype="bfloat16"`, which halves the moments' memory at the price of rounding noise, and
            `master_weights=True`, which keeps each weight in float32 too.

    Returns:
        A `keras.optimizers.Optimizer`.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_choice(name, "name", OPTIMIZERS)
    if "lr" in kwargs:
        raise ValueError(f"`lr` is not an argument: use `learning_rate={kwargs['lr']!r}`.")
    steps = None if steps is None else integer(steps, "steps")
    if warmup_steps is None:
        warmup_steps = WARMUP_STEPS if steps is None else min(WARMUP_STEPS, steps // 10)
    warmup_steps = integer(warmup_steps, "warmup_steps", least=0)
    if steps is not None and warmup_steps > steps:
        raise ValueError(f"`warmup_steps` must be at most steps={steps}. Received: warmup_steps={warmup_steps}.")
    if learning_rate is not None and not (is_number(learning_rate) and learning_rate > 0):
        raise ValueError(
            f"`learning_rate` must be positive, the peak of a schedule. Received: learning_rate={learning_rate!r}. For "
            f"a schedule of your own, set the attribute: `adamw = optimizer(...); adamw.learning_rate = schedule`."
        )
    if not (is_number(final_fraction) and 0 <= final_fraction <= 1):
        raise ValueError(f"`final_fraction` must be in [0, 1]. Received: final_fraction={final_fraction!r}.")
    if name == "muon":
        kwargs = {"adam_weight_decay": weight_decay or None, **kwargs}  # for the weights that AdamW updates
    configured = OPTIMIZERS[name](
        learning_rate=WarmupCosine(learning_rate, steps, warmup_steps, final_fraction),
        weight_decay=weight_decay or (0.0 if name == "adamw" else None),
        global_clipnorm=clip_norm,
        **kwargs,
    )
    configured.exclude_from_weight_decay(var_names=list(no_decay))
    return configured


def resolve_optimizer(
    optimizer_or_name: str | keras.optimizers.Optimizer | None, policy: keras.DTypePolicy, scale_loss: bool = True
) -> str | keras.optimizers.Optimizer | None:
    """The optimizer that a model's `compile` passes on to Keras.

    Args:
        optimizer_or_name: "auto" for `optimizer(warmup_steps=0)`; a name, an optimizer or None as in Keras.
        policy: the model's dtype policy.
        scale_loss: `auto_scale_loss` of `compile`.

    Returns:
        The optimizer; in a `LossScaleOptimizer` if the policy is "float16", whose gradients, those of LoRA, are float16
        too: Keras scales the loss only for "mixed_float16".
    """
    if isinstance(optimizer_or_name, str) and optimizer_or_name == "auto":
        optimizer_or_name = optimizer(warmup_steps=0)
    if policy.name != "float16" or optimizer_or_name is None or not scale_loss:
        return optimizer_or_name
    scaled = keras.optimizers.get(optimizer_or_name)
    is_scaled = isinstance(scaled, keras.optimizers.LossScaleOptimizer)
    return scaled if is_scaled else keras.optimizers.LossScaleOptimizer(scaled)
