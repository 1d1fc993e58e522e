"""`CrossAttentionWarmup`: trains cross-attention alone at first."""

import keras

from keras_t5gemma._keras_internals import variable_array
from keras_t5gemma.checks import integer
from keras_t5gemma.training.steps.model import OwnSteps

# In the path of the four kernels and of the two norms around them, LoRA's factors included.
_CROSS_ATTENTION = "cross_attention"


class CrossAttentionWarmup(keras.callbacks.Callback):
    """Trains cross-attention alone for the first optimizer steps, then everything.

    An unbalanced pair has no self-attention to start cross-attention from: it starts from scratch, with the norms
    around it, between two stacks that are trained already. arXiv 2504.06225 trains it alone for the first
    1,000 steps with everything else frozen (9B-2B: 62.5 with, 61.8 without, 60.2 with 5,000 steps).

        lm.fit(data, steps_per_epoch=10_000, callbacks=[CrossAttentionWarmup(steps=1000)])

    Steps are the optimizer's own count, from its first on: a run that goes on from a checkpoint saved with its
    optimizer goes on with the warm-up, too. What is not trainable to begin with, such as everything under LoRA but its
    factors, stays as it is.

    Frozen here means that values are the same after each step, bit by bit: neither gradients nor weight decay nor
    constraints move them. The optimizer itself runs as it will afterwards, on all gradients, clipping by their global
    norm included, so that its moments are ready at the release. Hiding the frozen variables from it would be worse:
    Adam corrects its moments for having started at zero by its count of steps, so that moments which start at step
    1,000 go uncorrected and make steps of up to 6 times the learning rate (what fine-tuning without the correction does
    is in arXiv 2006.05987). In a trial with a small model the loss rose by 0.3 at such a release; like this it fell.
    The price is that a step of the warm-up costs what any step costs, and on PyTorch a copy of the frozen values.

    Args:
        steps: optimizer steps, K; a multiple of `steps_per_execution`, or the rest of its last execution is frozen too.

    Raises:
        ValueError: if `steps` is not a positive integer; in `fit`, if the model has no trainable cross-attention or is
            no `T5GemmaSeq2SeqLM`, or its optimizer keeps moving averages (`use_ema`), which would move.
    """

    def __init__(self, steps: int):
        super().__init__()
        self.steps = integer(steps, "steps")
        self._batches_to_go = None  # of the warm-up, before the optimizer's count is read again; None after it

    def on_train_begin(self, logs: dict | None = None) -> None:  # noqa: ARG002 Keras's signature
        """Freezes, unless the optimizer is past the warm-up."""
        model, self._batches_to_go = self.model, None
        if not isinstance(model, OwnSteps):
            raise ValueError(
                f"CrossAttentionWarmup needs a `T5GemmaSeq2SeqLM`, whose training steps can leave weights as they are. "
                f"Received: {type(model).__name__}."
            )
        # Mixed precision wraps the optimizer that applies the gradients in one that scales the loss.
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        if int(variable_array(optimizer.iterations)) >= self.steps:
            return
        frozen = [variable for variable in model.trainable_variables if _CROSS_ATTENTION not in variable.path]
        if len(frozen) == len(model.trainable_variables):
            raise ValueError(
                f"CrossAttentionWarmup found no trainable variable with {_CROSS_ATTENTION!r} in its path among the "
                f"{len(frozen)} of {model.name!r}. Leave the callback out, or make cross-attention trainable."
            )
        if optimizer.use_ema:
            raise ValueError(
                "CrossAttentionWarmup cannot keep frozen variables' moving averages still. Train with `use_ema=False` "
                "for the warm-up."
            )
        model.freeze_during_fit(frozen)
        self._batches_per_execution = model.steps_per_execution
        self._batches_per_update = optimizer.gradient_accumulation_steps or 1
        self._read_count()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Releases after the last step of the warm-up."""
        if self._batches_to_go is not None:
            self._batches_to_go -= self._batches_per_execution
            if self._batches_to_go <= 0:
                self._read_count()

    def _read_count(self) -> None:
        """Reads the optimizer's count of updates, and releases if the warm-up is over."""
        # On JAX, reading `self.model` writes the running state back into the variables: not for every step.
        left = self.steps - int(variable_array(self.model.optimizer.iterations))
        # If loss scaling skipped a step, or some had been accumulated before, this is asked more than once.
        self._batches_to_go = left * self._batches_per_update if left > 0 else None
        if left <= 0:
            self.model.freeze_during_fit([])
