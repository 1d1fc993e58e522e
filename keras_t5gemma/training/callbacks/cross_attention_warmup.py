"""`CrossAttentionWarmup`: trains cross-attention alone at first."""

import contextlib
import functools

import keras
from keras import ops

from keras_t5gemma._keras_internals import variable_array
from keras_t5gemma.checks import integer

# In the path of the four kernels and of the two norms around them, LoRA's factors included.
_CROSS_ATTENTION = "cross_attention"


class CrossAttentionWarmup(keras.callbacks.Callback):
    """Trains cross-attention alone for the first optimiser steps, then everything.

    An unbalanced pair has no self-attention to start cross-attention from: it starts from scratch, with the norms
    around it, between two stacks that are trained already. arXiv 2504.06225 trains it alone for the first
    1,000 steps with everything else frozen (9B-2B: 62.5 with, 61.8 without, 60.2 with 5,000 steps).

        lm.fit(data, steps_per_epoch=10_000, callbacks=[CrossAttentionWarmup(steps=1000)])

    Steps are the optimiser's own count, from its first on: a run that goes on from a checkpoint saved with its
    optimiser goes on with the warm-up, too. What is not trainable to begin with, such as everything under LoRA but its
    factors, stays as it is.

    Frozen here means that values are put back after each step, bit by bit: neither gradients nor weight decay nor
    constraints move them. The optimiser itself runs as it will afterwards, on all gradients, clipping by their global
    norm included, so that its moments are ready at the release. Hiding the frozen variables from it would be worse:
    Adam corrects its moments for having started at zero by its count of steps, so that moments which start at step
    1,000 go uncorrected and make steps of up to 6 times the learning rate (what fine-tuning without the correction does
    is in arXiv 2006.05987). In a trial with a small model the loss rose by 0.3 at such a release; like this it fell.
    The price is that a step of the warm-up costs what any step costs, and on PyTorch a copy of the frozen values.

    Args:
        steps: optimiser steps, K; a multiple of `steps_per_execution`, or the rest of its last execution is frozen too.

    Raises:
        ValueError: where `steps` is no positive integer, and in `fit` where the model has no trainable cross-attention
            or its optimiser keeps moving averages (`use_ema`), which are taken before values are put back.
    """

    def __init__(self, steps):
        super().__init__()
        self.steps = integer(steps, "steps")
        self._release = None  # what ends the warm-up; None while there is none
        self._in_charge = False

    def on_train_begin(self, logs=None):  # noqa: ARG002 Keras's signature
        """Freezes, unless the optimiser is past the warm-up."""
        if self._release is not None:
            self._release()  # from a `fit` that an error ended
        model = self.model
        # Mixed precision wraps the optimiser that applies the gradients in one that scales the loss.
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        if int(variable_array(optimizer.iterations)) < self.steps:
            frozen = [variable for variable in model.trainable_variables if _CROSS_ATTENTION not in variable.path]
            if len(frozen) == len(model.trainable_variables):
                raise ValueError(
                    f"CrossAttentionWarmup found no trainable variable with {_CROSS_ATTENTION!r} in its path among the "
                    f"{len(frozen)} of {model.name!r}. Leave the callback out, or make cross-attention trainable."
                )
            if optimizer.use_ema:
                raise ValueError(
                    "CrossAttentionWarmup cannot keep frozen variables' moving averages still. Train with "
                    "`use_ema=False` for the warm-up."
                )
            self._freeze(model, optimizer, frozen)

    def on_train_batch_begin(self, batch, logs=None):  # noqa: ARG002
        """Says that the next step is this callback's to freeze."""
        self._in_charge = True

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
        """Releases after the last step of the warm-up."""
        if self._release is not None:
            self._batches_to_go -= self._batches_at_once
            if self._batches_to_go <= 0:
                self._look_at_the_count()

    def on_train_end(self, logs=None):  # noqa: ARG002
        """Releases what is still frozen."""
        if self._release is not None:
            self._release()

    def _freeze(self, model, optimizer, frozen):
        """Has the model train by a function of its own until the release.

        `train_function` is looked up anew at every step, on every backend; the usual one is compiled at the release
        only. Where an error ends `fit` early, no callback hears of it: then the first step of whatever trains the
        model next finds no callback in charge, and goes back to the usual function by itself.
        """
        usual = model.train_function
        # `jax.jit` of one method is one compiled function, however often it is made: it gets another to compile.
        with _replaced(model, "train_step", functools.partial(model.train_step)):
            model.make_train_function(force=True)
        warming_up = model.train_function
        apply = _putting_back(optimizer.apply, frozen)

        def train_function(*args):
            if not self._in_charge:
                release()
                return usual(*args)
            self._in_charge = False
            # Compiled functions are traced in here, others look `apply` up when they run.
            with _replaced(optimizer, "apply", apply):
                return warming_up(*args)

        def release():
            model.train_function = usual
            self._release = None

        model.train_function = train_function
        self._in_charge = False
        self._release = release
        self._batches_at_once = model.steps_per_execution
        self._batches_a_step = optimizer.gradient_accumulation_steps or 1
        self._look_at_the_count()

    def _look_at_the_count(self):
        # On JAX, reading `self.model` writes the running state back into the variables: not for every step.
        iterations = int(variable_array(self.model.optimizer.iterations))
        if iterations >= self.steps:
            self._release()
        # Where loss scaling skipped a step, or some had been accumulated before, this is asked more than once.
        self._batches_to_go = (self.steps - iterations) * self._batches_a_step


def _putting_back(apply, frozen):
    """An optimiser's `apply`, after which the frozen variables are as they were before."""

    def apply_and_put_back(grads, trainable_variables=None):
        before = [ops.copy(variable) for variable in frozen]
        apply(grads, trainable_variables)
        for variable, value in zip(frozen, before, strict=True):
            variable.assign(value)

    return apply_and_put_back


@contextlib.contextmanager
def _replaced(instance, name, method):
    """Puts a function in front of an instance's method, and takes it away again whatever happens."""
    setattr(instance, name, method)
    try:
        yield
    finally:
        delattr(instance, name)
