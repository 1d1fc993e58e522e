"""AdamW in one pass over the weights on every backend, without temporary arrays of a weight's size.

On TensorFlow and PyTorch, Keras's AdamW creates about ten temporary tensors per weight: half a gigabyte each for a
table of 256,000 x 512, and they take most of the time of a step.
"""

import functools

import keras
from keras import ops

from keras_t5gemma.training.optimizers import adamw_tensorflow, adamw_torch
from keras_t5gemma.training.optimizers.indexed_slices import is_distributed, without_duplicates
from keras_t5gemma.training.optimizers.learning_rates import DefaultLearningRate
from keras_t5gemma.training.optimizers.low_precision import LowPrecision, is_bfloat16
from keras_t5gemma.training.optimizers.weight_decay import SavesExclusions


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class AdamW(SavesExclusions, LowPrecision, DefaultLearningRate, keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` (arXiv 1711.05101), with the same numbers, arguments and saved state, in less memory.

    It trains bfloat16 weights too, with float32 moments; see `LowPrecision` for further arguments.

    On JAX the update is Keras's own, which XLA fuses. On TensorFlow the update is compiled by XLA, and on PyTorch it is
    PyTorch's fused kernel, if weights are float32 or bfloat16; both compute in float32. With `amsgrad` or under a
    `tf.distribute` strategy the update is Keras's own.
    """

    recommendation = "adamw"

    @functools.cached_property
    def tensorflow_updates(self) -> adamw_tensorflow.Updates:
        """The compiled updates; one set per optimizer, because a `tf.function` must not outlive its variables."""
        return adamw_tensorflow.Updates(self)

    def _clip_gradients(self, grads):
        if keras.config.backend() == "tensorflow" and self.global_clipnorm is not None:
            grads = [grad if is_bfloat16(grad) else without_duplicates(grad) for grad in grads]
        return super()._clip_gradients(grads)

    def _apply_weight_decay(self, variables):
        if self._is_fused(variables):
            return  # the fused update decays the weights in the same pass
        super()._apply_weight_decay(variables)

    def _update_all(self, grads, variables, learning_rate):
        """Updates all variables, in one pass over the weights if the backend has one, else by Keras.

        Args:
            grads: one gradient per variable.
            variables: `keras.Variable`s.
            learning_rate: a scalar.
        """
        if not self._is_fused(variables):
            super()._update_all(grads, variables, learning_rate)
            return
        grads = [
            grad if is_bfloat16(variable) else ops.cast(grad, "float32")
            for grad, variable in zip(grads, variables, strict=True)
        ]
        update = {"tensorflow": adamw_tensorflow.update, "torch": adamw_torch.update}[keras.config.backend()]
        update(self, grads, variables, learning_rate)

    def _is_fused(self, variables: list) -> bool:
        """Whether this package's update runs, not Keras's; see the class."""
        dtypes = {keras.backend.standardize_dtype(variable.dtype) for variable in variables}
        has_kernel = keras.config.backend() in ("tensorflow", "torch") and dtypes <= {"float32", "bfloat16"}
        return has_kernel and not self.amsgrad and not is_distributed()
