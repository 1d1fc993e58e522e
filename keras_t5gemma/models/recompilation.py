"""Training and inference keep up with a model that was changed since: LoRA, `quantize`, `trainable`.

Keras wants `compile` again after each of these. Without it JAX and PyTorch fail in their own ways, and TensorFlow goes
on with the program it has: it trains what was frozen, or predicts without LoRA.
"""

import warnings
import weakref

from keras_t5gemma._keras_internals import copy_weight_decay_exclusions, optimized_variables
from keras_t5gemma.layers.lora import lora_layers


class Recompiles:
    """For a task model around a `T5GemmaBackbone`: compiled functions and the optimizer are made anew if need be."""

    _compiled_for = None

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
        return super().evaluate(*args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        """As in Keras."""
        self._keep_up()
        return super().test_on_batch(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """As in Keras."""
        self._keep_up()
        return super().predict(*args, **kwargs)

    def predict_on_batch(self, *args, **kwargs):
        """As in Keras."""
        self._keep_up()
        return super().predict_on_batch(*args, **kwargs)

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
        optimizer, trainable = getattr(self, "optimizer", None), self.trainable_variables
        if not trainable:
            raise ValueError(
                "The model has no trainable weights. Set `trainable = True` on the model or on a part of it, or call "
                "`backbone.enable_lora`."
            )
        if optimizer is None or (known := optimized_variables(optimizer)) is None:
            return
        if list(map(id, known)) == list(map(id, trainable)):
            return
        try:
            renewed = type(optimizer).from_config(optimizer.get_config())
        except Exception as error:
            raise ValueError(
                f"The weights to train changed since the optimizer was built ({len(known)} variables then, "
                f"{len(trainable)} now), and {type(optimizer).__name__} cannot be made again from its config "
                f"({type(error).__name__}: {error}). Call `compile` again, with a new optimizer."
            ) from error
        copy_weight_decay_exclusions(optimizer, renewed)
        warnings.warn(
            f"The weights to train changed since the optimizer was built ({len(known)} variables then, "
            f"{len(trainable)} now). Training goes on as `compile` with the same arguments would: a new optimizer, "
            f"with moments of zero and its learning rate's schedule at the start.",
            stacklevel=4,
        )
        self.optimizer = renewed


def _refers_to(reference, variable):
    return reference() is variable
