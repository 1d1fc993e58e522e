"""Muon, for bfloat16 weights too."""

import keras

from keras_t5gemma.training.optimizers.learning_rates import DefaultLearningRate
from keras_t5gemma.training.optimizers.low_precision import LowPrecision
from keras_t5gemma.training.optimizers.weight_decay import SavesExclusions


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class Muon(SavesExclusions, LowPrecision, DefaultLearningRate, keras.optimizers.Muon):
    """`keras.optimizers.Muon` (arXiv 2502.16982), with the same numbers for float32 weights; see `LowPrecision`.

    Matrices are updated by Newton-Schulz steps; embeddings, norms and all other weights are updated by AdamW.
    """

    recommendation = "muon"

    def decay_of(self, variable) -> float:
        """The decay rate of a variable; `adam_weight_decay` if AdamW updates it."""
        variable = self._trainable_variables[self._get_variable_index(variable)]
        if not self._use_weight_decay(variable):
            return 0.0
        return (self.adam_weight_decay if self._should_use_adamw(variable) else self.weight_decay) or 0.0
