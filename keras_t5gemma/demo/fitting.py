"""The optimizer of every training run of the demo."""

import keras

import keras_t5gemma as kt
from keras_t5gemma.demo.settings import Training


def optimizer(training: Training) -> keras.optimizers.Optimizer:
    """AdamW with the schedule of the papers, scaled to the demo's few steps.

    Args:
        training: the `Training`.

    Returns:
        A Keras optimizer.
    """
    return kt.optimizer(
        "adamw",
        learning_rate=training.learning_rate,
        steps=training.steps,
        warmup_steps=max(1, training.steps // 10),
        beta_2=0.99,  # in so few steps Keras's 0.999 would remember the first gradients to the end
    )
