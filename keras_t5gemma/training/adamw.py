"""AdamW in one pass over the weights on every backend: nothing of a weight's size is made on the way.

Keras's own makes some ten temporary tensors a weight on TensorFlow and PyTorch: half a gigabyte each for a table of
256,000 x 512, and most of the time of a step.
"""

import functools

import keras


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class AdamW(keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` (arXiv 1711.05101), with the same numbers, arguments and saved state, in less memory.

    On JAX it is Keras's own, which XLA fuses. On TensorFlow the update is compiled by XLA, on PyTorch it is PyTorch's
    fused kernel; both where weights and gradients are float32 and `amsgrad` is off. Elsewhere, and under a
    `tf.distribute` strategy, Keras's own is at work.
    """

    @functools.cached_property
    def tensorflow_update(self):
        """One weight's step, compiled; an optimiser's own, because a `tf.function` must not outlive its variables."""
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def update(variable, momentum, velocity, grad, alpha):
            new_momentum = momentum + (grad - momentum) * (1 - self.beta_1)
            new_velocity = velocity + (tf.square(grad) - velocity) * (1 - self.beta_2)
            momentum.assign(new_momentum)
            velocity.assign(new_velocity)
            variable.assign_sub(new_momentum * alpha / (tf.sqrt(new_velocity) + self.epsilon))
            return alpha

        return update

    def _clip_gradients(self, grads):
        if keras.config.backend() == "tensorflow" and self.global_clipnorm is not None:
            grads = [_without_duplicates(grad) for grad in grads]
        return super()._clip_gradients(grads)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        update = {"tensorflow": _tensorflow_update, "torch": _torch_update}.get(keras.config.backend())
        dtypes = {keras.backend.standardize_dtype(x.dtype) for x in (*grads, *trainable_variables)}
        if update is None or self.amsgrad or dtypes != {"float32"} or _is_distributed():
            super()._backend_update_step(grads, trainable_variables, learning_rate)
        else:
            update(self, grads, trainable_variables, learning_rate)


def _is_distributed():
    if keras.config.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.has_strategy()


def _without_duplicates(grad):
    """A lookup's gradient with one row an id: TensorFlow's norm would take the rows of a repeated id one by one."""
    import tensorflow as tf

    if not isinstance(grad, tf.IndexedSlices):
        return grad
    indices, rows = tf.unique(grad.indices)
    return tf.IndexedSlices(
        tf.math.unsorted_segment_sum(grad.values, rows, tf.size(indices)), indices, grad.dense_shape
    )


def _torch_update(optimizer, grads, variables, learning_rate):
    import torch
    from torch.optim.adam import adam

    values = [variable.value for variable in variables]
    places = [optimizer._get_variable_index(variable) for variable in variables]
    # PyTorch counts the step itself, as float32 on the weights' device.
    steps = [torch.full((), float(optimizer.iterations), device=value.device) for value in values]
    correction = 1 - optimizer.beta_2 ** (float(optimizer.iterations) + 1)
    with torch.no_grad():
        adam(
            values,
            [grad.contiguous() for grad in grads],
            [optimizer._momentums[place].value for place in places],
            [optimizer._velocities[place].value for place in places],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            lr=float(learning_rate),
            weight_decay=0.0,  # Keras has applied it, with its list of what is exempt
            # Keras adds epsilon to the root before the bias is corrected, PyTorch after.
            eps=optimizer.epsilon / correction**0.5,
            maximize=False,
        )


def _tensorflow_update(optimizer, grads, variables, learning_rate):
    import tensorflow as tf

    local_step = tf.cast(optimizer.iterations.value + 1, "float32")
    corrections = tf.sqrt(1 - optimizer.beta_2**local_step) / (1 - optimizer.beta_1**local_step)
    alpha = tf.cast(learning_rate, "float32") * corrections
    update = optimizer.tensorflow_update
    previous = []
    for grad, variable in zip(grads, variables, strict=True):
        place = optimizer._get_variable_index(variable)
        states = [optimizer._momentums[place].value, optimizer._velocities[place].value]
        # One after the other: all at once would need all tables' dense gradients at once.
        with tf.control_dependencies(previous):
            dense = tf.convert_to_tensor(grad)  # lookups have sparse ones
            previous = [update(variable.value, *states, dense, alpha)]
