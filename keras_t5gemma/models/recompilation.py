"""Recompiles a model after LoRA, `quantize` or `trainable` changed it.

Keras wants `compile` again after each of these. Without it JAX and PyTorch fail in their own ways, and TensorFlow goes
on with the program it has: it trains what was frozen, or predicts without LoRA.
"""

import contextlib
import warnings
import weakref

from keras_t5gemma._keras_internals import EvaluatesWithoutOptimizer, copy_weight_decay_exclusions, optimized_variables
from keras_t5gemma.layers.lora import lora_layers


class Recompiles(EvaluatesWithoutOptimizer):
    """For a task model around a `T5GemmaBackbone`: compiled functions and the optimizer are made anew if need be."""

    _compiled_for = None
    # Numbers of variables (then, now) of an optimizer that was replaced, until `fit` has said so.
    _replaced = None

    def fit(self, *args, **kwargs):
        """As in Keras."""
        self._keep_up(trains=True)
        return super().fit(*args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        """As in Keras."""
        self._keep_up(trains=True)
        return super().train_on_batch(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """As in Keras."""
        self._keep_up()
        with self._only_evaluating():
            return super().evaluate(*args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        """As in Keras."""
        self._keep_up()
        with self._only_evaluating():
            return super().test_on_batch(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """As in Keras."""
        self._keep_up()
        return super().predict(*args, **kwargs)

    def predict_on_batch(self, *args, **kwargs):
        """As in Keras."""
        self._keep_up()
        return super().predict_on_batch(*args, **kwargs)

    def load_weights(self, *args, **kwargs):
        """As in Keras. The optimizer's state counts where the optimizer has one by now, for the same weights."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
            return super().load_weights(*args, **kwargs)

    def save_own_variables(self, store):
        """As in Keras, which comes here first when it saves a model, and then to the optimizer."""
        # What an optimizer knows of other weights than those that train now could not be read back.
        with contextlib.suppress(Exception):  # one that cannot be made again: `fit` says so
            self._replace_outdated_optimizer()
        super().save_own_variables(store)

    def get_compile_config(self):
        """As in Keras; and whether the optimizer has state that is saved, so that the loaded one expects it."""
        config = super().get_compile_config()
        optimizer = getattr(self, "optimizer", None)
        is_built = optimizer is not None and optimized_variables(optimizer) is not None
        return {**config, "optimizer_is_built": is_built and not self._outdated()}

    def _keep_up(self, trains=False):
        variables = self.weights
        # A program holds these numbers as constants.
        numbers = [variable.trainable for variable in variables]
        numbers += [(layer.lora_rank, layer.lora_alpha) for layer in lora_layers(self.backbone).values()]
        known, known_numbers = self._compiled_for or ((), ())
        is_same = len(known) == len(variables) and all(map(_refers_to, known, variables))
        if not is_same or known_numbers != numbers:
            # What Keras's own `quantize` does.
            self.train_function = self.test_function = self.predict_function = None
            self._compiled_for = tuple(map(weakref.ref, variables)), numbers
        if trains:
            self._renew_optimizer()

    def _renew_optimizer(self):
        if not self.trainable_variables:
            raise ValueError(
                "The model has no trainable weights. Set `trainable = True` on the model or on a part of it, or call "
                "`backbone.enable_lora`."
            )
        self._replace_outdated_optimizer()
        if self._replaced is None:
            return
        (known, now), self._replaced = self._replaced, None
        warnings.warn(
            f"The weights to train changed since the optimizer was built ({known} variables then, {now} now). Training "
            f"goes on as `compile` with the same arguments would: a new optimizer, with moments of zero and its "
            f"learning rate's schedule at the start.",
            stacklevel=4,
        )

    def _outdated(self):
        """The variables that the optimizer was built for, if they are no longer those that train; or None."""
        optimizer = getattr(self, "optimizer", None)
        known = None if optimizer is None else optimized_variables(optimizer)
        return None if known is None or list(map(id, known)) == list(map(id, self.trainable_variables)) else known

    def _replace_outdated_optimizer(self):
        known = self._outdated()
        if known is None:
            return
        optimizer, trainable = self.optimizer, self.trainable_variables
        try:
            renewed = type(optimizer).from_config(optimizer.get_config())
        except Exception as error:
            raise ValueError(
                f"The weights to train changed since the optimizer was built ({len(known)} variables then, "
                f"{len(trainable)} now), and {type(optimizer).__name__} cannot be made again from its config "
                f"({type(error).__name__}: {error}). Call `compile` again, with a new optimizer."
            ) from error
        copy_weight_decay_exclusions(optimizer, renewed)
        self._replaced = self._replaced or (len(known), len(trainable))
        self.optimizer = renewed


def _refers_to(reference, variable):
    return reference() is variable
