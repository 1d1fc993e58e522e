"""The optimizer of every training run of the demo."""

import keras_t5gemma as kt


def optimizer(training):
    """AdamW with a schedule as the papers', shrunk to the demo's few steps.

    Args:
        training: the `Training`.
    """
    return kt.optimizer(
        "adamw",
        learning_rate=training.learning_rate,
        steps=training.steps,
        warmup_steps=max(1, training.steps // 10),
        beta_2=0.99,  # over so few steps Keras's 0.999 would remember the first gradients to the end
    )
