"""Recompiles a model after LoRA, `quantize` or `trainable` changed it.

Keras requires another `compile` after each of these. Without it, JAX and PyTorch fail in different ways, and TensorFlow
continues with its old program: it trains weights that are frozen now, or predicts without LoRA.
"""

import contextlib
import warnings
import weakref
from collections.abc import Mapping, Sequence

import keras

from keras_t5gemma._keras_internals import (
    BuildsMetricsFirst,
    EvaluatesWithoutOptimizer,
    copy_weight_decay_exclusions,
    optimized_variables,
)
from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.layers.lora import lora_layers


class RecompilationMixin(BuildsMetricsFirst, EvaluatesWithoutOptimizer):
    """Mixin for a task model around a `T5GemmaBackbone`: renews compiled functions and the optimizer when needed."""

    # Weak references to the variables, and the numbers, that the compiled functions belong to.
    _compiled_state = None
    # (then, now): numbers of variables of an optimizer that was replaced, until `fit` has warned about it.
    _replaced_counts = None

    def fit(self, *args, **kwargs):
        """Trains the model as Keras does, after a change of its weights too."""
        self._refresh(trains=True)
        return super().fit(*args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        """Trains on one batch as Keras does, after a change of the weights too."""
        self._refresh(trains=True)
        return super().train_on_batch(*args, **kwargs)

    def enable_lora(
        self,
        rank: int | Mapping[str, int],
        target_layer_names: str | Sequence[str] | None = None,
        *,
        lora_alpha: float | None = None,
    ) -> None:
        """The backbone's `enable_lora`. The weights of a head outside the backbone stay trainable.

        Args:
            rank: as for `T5GemmaBackbone.enable_lora`.
            target_layer_names: as for `T5GemmaBackbone.enable_lora`.
            lora_alpha: as for `T5GemmaBackbone.enable_lora`.

        Raises:
            ValueError: as for `T5GemmaBackbone.enable_lora`.
        """
        self.backbone.enable_lora(rank, target_layer_names, lora_alpha=lora_alpha)

    def merge_lora(self) -> None:
        """The backbone's `merge_lora`.

        Raises:
            ValueError: as for `T5GemmaBackbone.merge_lora`.
        """
        self.backbone.merge_lora()

    def renew_for_training(self) -> None:
        """Discards outdated compiled functions and renews an outdated optimizer, for code that trains without `fit`."""
        self._refresh(trains=True)

    def evaluate(self, *args, **kwargs):
        """Evaluates the model as Keras does, without creating the optimizer's state."""
        self._refresh()
        with self._only_evaluating():
            return super().evaluate(*args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        """Evaluates one batch as Keras does, without creating the optimizer's state."""
        self._refresh()
        with self._only_evaluating():
            return super().test_on_batch(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """Predicts as Keras does, after a change of the weights too."""
        self._refresh()
        return super().predict(*args, **kwargs)

    def predict_on_batch(self, *args, **kwargs):
        """Predicts one batch as Keras does, after a change of the weights too."""
        self._refresh()
        return super().predict_on_batch(*args, **kwargs)

    def load_weights(self, *args, **kwargs):
        """Loads weights as Keras does, and the optimizer's state if the optimizer is built for the same weights."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
            return super().load_weights(*args, **kwargs)

    def save_own_variables(self, store):
        """Stores the model's own variables. Keras calls this first when it saves a model, before the optimizer's."""
        # An outdated optimizer is replaced: its state belongs to other weights and could not be loaded again.
        with contextlib.suppress(Exception):  # `fit` reports an optimizer that cannot be created again
            self._replace_outdated_optimizer()
        super().save_own_variables(store)

    def get_compile_config(self):
        """Keras's config, and whether the optimizer's state is saved, so that a loaded optimizer expects it."""
        config = super().get_compile_config()
        optimizer = getattr(self, "optimizer", None)
        is_built = optimizer is not None and optimized_variables(optimizer) is not None
        return {**config, "optimizer_is_built": is_built and not self._outdated_variables()}

    def _refresh(self, trains: bool = False) -> None:
        """Discards compiled functions if the model's variables have changed; renews the optimizer if `trains`."""
        variables = self.weights
        # Compiled functions contain these numbers as constants.
        numbers = [variable.trainable for variable in variables]
        numbers += [(layer.lora_rank, layer.lora_alpha) for layer in lora_layers(self.backbone).values()]
        references, compiled_numbers = self._compiled_state or ((), ())
        is_same = len(references) == len(variables) and all(map(_refers_to, references, variables))
        if not is_same or compiled_numbers != numbers:
            # Keras's own `quantize` does the same.
            self.train_function = self.test_function = self.predict_function = None
            self._compiled_state = tuple(map(weakref.ref, variables)), numbers
        if trains:
            self._renew_optimizer()

    def _renew_optimizer(self) -> None:
        """Replaces an outdated optimizer, with a warning."""
        if not self.trainable_variables:
            raise ValueError(
                "The model has no trainable weights. Set `trainable = True` on the model or on a part of it, or call "
                "`backbone.enable_lora`."
            )
        self._replace_outdated_optimizer()
        if self._replaced_counts is None:
            return
        (then, now), self._replaced_counts = self._replaced_counts, None
        warn_caller(
            f"The weights to train changed since the optimizer was built ({then} variables then, {now} now). Training "
            f"continues as after another `compile` with the same arguments: with a new optimizer, whose moments are "
            f"zero and whose learning rate schedule is at the start."
        )

    def _outdated_variables(self) -> list[keras.Variable] | None:
        """The variables that the optimizer was built for if other variables are trained now; otherwise None."""
        optimizer = getattr(self, "optimizer", None)
        built_for = None if optimizer is None else optimized_variables(optimizer)
        is_current = built_for is None or list(map(id, built_for)) == list(map(id, self.trainable_variables))
        return None if is_current else built_for

    def _replace_outdated_optimizer(self) -> None:
        """Creates the optimizer again from its config if it was built for other variables."""
        outdated = self._outdated_variables()
        if outdated is None:
            return
        optimizer, trainable = self.optimizer, self.trainable_variables
        try:
            renewed = type(optimizer).from_config(optimizer.get_config())
        except Exception as error:
            raise ValueError(
                f"The weights to train changed since the optimizer was built ({len(outdated)} variables then, "
                f"{len(trainable)} now), and {type(optimizer).__name__} cannot be made again from its config "
                f"({type(error).__name__}: {error}). Call `compile` again, with a new optimizer."
            ) from error
        copy_weight_decay_exclusions(optimizer, renewed)
        self._replaced_counts = self._replaced_counts or (len(outdated), len(trainable))
        self.optimizer = renewed


def _refers_to(reference: weakref.ref, variable: keras.Variable) -> bool:
    return reference() is variable
