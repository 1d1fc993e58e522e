"""The optimiser of an adaptation run: schedule, clipping and weight decay as in the papers."""

import keras

from keras_t5gemma.checks import integer
from keras_t5gemma.suggestions import check_choice
from keras_t5gemma.training.adamw import AdamW

# What is not a matrix product has no business shrinking: norms, and embeddings, whose rows are seldom visited.
NO_DECAY = ("scale", "embeddings")
OPTIMIZERS = {
    "adamw": AdamW,
    "adafactor": keras.optimizers.Adafactor,
    "muon": keras.optimizers.Muon,
}


def optimizer(
    name="adamw",
    *,
    learning_rate,
    steps,
    warmup_steps=100,
    final_fraction=0.1,
    weight_decay=0.01,
    no_decay=NO_DECAY,
    clip_norm=1.0,
    **kwargs,
):
    """A Keras optimiser with a warm-up, a cosine, clipping by the global norm and weight decay.

    A linear warm-up of 100 steps, then a cosine, and gradients clipped at a global norm of 1 are T5Gemma 2's (arXiv
    2512.14856); a tenth at the end of the cosine and the weight decay are common choices, which it does not name.

        lm.compile(optimizer=optimizer("adamw", learning_rate=1e-4, steps=10_000))

    Args:
        name: "adamw"; "adafactor", which keeps no second moment a weight; or "muon", which takes matrices through
            Newton-Schulz steps and embeddings and norms through AdamW.
        learning_rate: the peak, reached after the warm-up.
        steps: optimiser steps in all; the cosine ends there.
        warmup_steps: of the linear warm-up from zero; at most `steps`.
        final_fraction: of the peak, where the cosine ends.
        weight_decay: a step's shrinkage is `learning_rate * weight_decay`.
        no_decay: a weight with one of these in its name is not shrunk.
        clip_norm: the largest global norm of the gradients; None for any.
        **kwargs: what the optimiser's class takes besides, e.g. `beta_2`.

    Returns:
        A `keras.optimizers.Optimizer`.

    Raises:
        ValueError: where an argument is none of these.
    """
    check_choice(name, "name", OPTIMIZERS)
    steps, warmup_steps = integer(steps, "steps"), integer(warmup_steps, "warmup_steps", least=0)
    if warmup_steps > steps:
        raise ValueError(f"`warmup_steps` must be at most steps={steps}. Received: warmup_steps={warmup_steps}.")
    if not learning_rate > 0:
        raise ValueError(f"`learning_rate` must be positive. Received: learning_rate={learning_rate!r}.")
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"`final_fraction` must be in [0, 1]. Received: final_fraction={final_fraction!r}.")
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else learning_rate,
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
        decay_steps=max(1, steps - warmup_steps),
        alpha=final_fraction,
    )
    if name == "muon":
        kwargs = {"adam_weight_decay": weight_decay or None, **kwargs}  # of what goes through its AdamW
    made = OPTIMIZERS[name](
        learning_rate=schedule, weight_decay=weight_decay or None, global_clipnorm=clip_norm, **kwargs
    )
    made.exclude_from_weight_decay(var_names=list(no_decay))
    return made
