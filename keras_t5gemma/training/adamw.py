"""AdamW in one pass over the weights on every backend: nothing of a weight's size is made on the way.

Keras's own makes some ten temporary tensors a weight on TensorFlow and PyTorch: half a gigabyte each for a table of
256,000 x 512, and most of the time of a step.
"""

import functools

import keras
from keras import ops

# Of weights, gradients and moments, which are one.
_FUSED_DTYPES = {"tensorflow": ("float32",), "torch": ("float32", "bfloat16")}


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class AdamW(keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` (arXiv 1711.05101), with the same numbers, arguments and saved state, in less memory.

    On JAX it is Keras's own, which XLA fuses. On TensorFlow the update is compiled by XLA, where weights are float32,
    and on PyTorch it is PyTorch's fused kernel, where they are float32 or bfloat16, both computed in float32.
    Elsewhere, with `amsgrad` and under a `tf.distribute` strategy, Keras's own is at work.
    """

    @functools.cached_property
    def tensorflow_update(self):
        """One weight's step, compiled; an optimiser's own, because a `tf.function` must not outlive its variables."""
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def update(variable, momentum, velocity, alpha, decay, grad):
            momentum.assign_add((grad - momentum) * (1 - self.beta_1))
            velocity.assign_add((tf.square(grad) - velocity) * (1 - self.beta_2))
            variable.assign(_stepped(variable, momentum, velocity, alpha, decay, self.epsilon))
            return alpha

        return update

    @functools.cached_property
    def tensorflow_update_rows(self):
        """The same for a table of which only some rows have a gradient, without one of the table's size."""
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def update(variable, momentum, velocity, alpha, decay, rows, places):
            places = tf.expand_dims(places, -1)
            shrunk = momentum - momentum * (1 - self.beta_1), velocity - velocity * (1 - self.beta_2)
            momentum.assign(tf.tensor_scatter_nd_add(shrunk[0], places, rows * (1 - self.beta_1)))
            velocity.assign(tf.tensor_scatter_nd_add(shrunk[1], places, tf.square(rows) * (1 - self.beta_2)))
            variable.assign(_stepped(variable, momentum, velocity, alpha, decay, self.epsilon))
            return alpha

        return update

    def _clip_gradients(self, grads):
        if keras.config.backend() == "tensorflow" and self.global_clipnorm is not None:
            grads = [_without_duplicates(grad) for grad in grads]
        return super()._clip_gradients(grads)

    def _apply_weight_decay(self, variables):
        if self._is_fused(variables):
            return  # the update does it, in the same pass
        super()._apply_weight_decay(variables)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if self._is_fused(trainable_variables):
            update = {"tensorflow": _tensorflow_update, "torch": _torch_update}[keras.config.backend()]
            dtype = trainable_variables[0].dtype
            update(self, [ops.cast(grad, dtype) for grad in grads], trainable_variables, learning_rate)
        else:
            super()._backend_update_step(grads, trainable_variables, learning_rate)

    def _is_fused(self, variables):
        served = _FUSED_DTYPES.get(keras.config.backend(), ())
        dtypes = {keras.backend.standardize_dtype(variable.dtype) for variable in variables}
        return not self.amsgrad and len(dtypes) == 1 and dtypes.issubset(served) and not _is_distributed()


def _is_distributed():
    if keras.config.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.has_strategy()


def _without_duplicates(grad):
    """A lookup's gradient with one row an id: TensorFlow's norm would take the rows of a repeated id one by one.

    The rows stay as many, so that XLA compiles once; those left over are zero, and said to be id 0's.
    """
    import tensorflow as tf

    if not isinstance(grad, tf.IndexedSlices):
        return grad
    count = tf.size(grad.indices)
    ids, rows = tf.unique(grad.indices)
    return tf.IndexedSlices(
        tf.math.unsorted_segment_sum(grad.values, rows, count),
        tf.pad(ids, [[0, count - tf.size(ids)]]),
        grad.dense_shape,
    )


def _torch_update(optimizer, grads, variables, learning_rate):
    import torch
    from torch.optim.adamw import adamw

    # Keras adds epsilon to the root before the bias is corrected, PyTorch after.
    correction = 1 - optimizer.beta_2 ** (float(optimizer.iterations) + 1)
    pairs = list(zip(grads, variables, strict=True))
    for decay in {_decay(optimizer, variable) for variable in variables}:
        chosen = [(grad, variable) for grad, variable in pairs if _decay(optimizer, variable) == decay]
        values = [variable.value for _, variable in chosen]
        places = [optimizer._get_variable_index(variable) for _, variable in chosen]
        with torch.no_grad():
            adamw(
                values,
                [grad.contiguous() for grad, _ in chosen],
                [optimizer._momentums[place].value for place in places],
                [optimizer._velocities[place].value for place in places],
                [],
                # PyTorch counts the step itself, as float32 on the weights' device.
                [torch.full((), float(optimizer.iterations), device=value.device) for value in values],
                fused=True,
                amsgrad=False,
                beta1=optimizer.beta_1,
                beta2=optimizer.beta_2,
                lr=float(learning_rate),
                weight_decay=decay,
                eps=optimizer.epsilon / correction**0.5,
                maximize=False,
            )


def _decay(optimizer, variable):
    """What a variable loses of itself in a step, to the learning rate."""
    decays = optimizer.weight_decay is not None and optimizer._use_weight_decay(variable)
    return optimizer.weight_decay if decays else 0.0


def _stepped(variable, momentum, velocity, alpha, decay, epsilon):
    import tensorflow as tf

    return variable - variable * decay - momentum * alpha / (tf.sqrt(velocity) + epsilon)


def _tensorflow_update(optimizer, grads, variables, learning_rate):
    import tensorflow as tf

    local_step = tf.cast(optimizer.iterations.value + 1, "float32")
    corrections = tf.sqrt(1 - optimizer.beta_2**local_step) / (1 - optimizer.beta_1**local_step)
    learning_rate = tf.cast(learning_rate, "float32")
    previous = []
    # Backwards, and one after the other: gradients of the last weights are there first, and go before the others come.
    for grad, variable in reversed(list(zip(grads, variables, strict=True))):
        place = optimizer._get_variable_index(variable)
        states = [optimizer._momentums[place].value, optimizer._velocities[place].value]
        factors = learning_rate * corrections, learning_rate * _decay(optimizer, variable)
        with tf.control_dependencies(previous):
            if isinstance(grad, tf.IndexedSlices):
                once = _without_duplicates(grad)
                last = optimizer.tensorflow_update_rows(variable.value, *states, *factors, once.values, once.indices)
            else:
                last = optimizer.tensorflow_update(variable.value, *states, *factors, grad)
        previous = [last]
