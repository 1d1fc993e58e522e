"""What every training run of the demo shares: optimiser, loss, progress, measuring."""

import grain
import keras

# Batches are made faster than they are used; by default Grain would take 16 threads and make 500 ahead.
READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


def compile_model(model, training):
    """AdamW with the paper's kind of schedule: a short warm-up, then a cosine; gradients clipped at norm 1.

    Args:
        model: a keras-hub task model.
        training: the `Training`.
    """
    warmup = max(1, training.steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=training.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(1, training.steps - warmup),
        alpha=0.1,
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.01, beta_2=0.99, global_clipnorm=1.0),
        # A mean over target tokens: Keras's default divides by padding too.
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        weighted_metrics=[],
    )


def mean_loss(model, batches):
    """Cross-entropy a target token, in nats, over all target tokens of some batches.

    Args:
        model: a compiled model.
        batches: (x, y) or (x, y, sample_weight), an iterable.
    """
    total = tokens = 0.0
    for x, y, *weight in batches:
        batch_tokens = float(weight[0].sum()) if weight else y.size
        loss = model.test_on_batch(x, y, *weight, return_dict=True)["loss"]
        model.reset_metrics()
        total += float(loss) * batch_tokens
        tokens += batch_tokens
    return total / tokens


class StepLosses(keras.callbacks.Callback):
    """Keeps the training loss of every step, and tells a listener.

    Args:
        on_step: called with each step's loss, or `None`.

    Attributes:
        losses: a float a step.
    """

    def __init__(self, on_step=None):
        super().__init__()
        self.on_step = on_step
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        """Takes the step's own loss out of the mean over the epoch so far, which is what Keras reports."""
        mean = float(logs["loss"])
        step_loss = mean * (batch + 1) - self._sum
        self._sum += step_loss
        self.losses.append(step_loss)
        if self.on_step:
            self.on_step(step_loss)

    def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002 Keras's signature
        """Keras's means start anew with an epoch."""
        self._sum = 0.0
