"""AdamW's step on TensorFlow: one function per weight, compiled by XLA."""

import functools

from keras_t5gemma.training.optimizers.indexed_slices import float32_gradient, without_duplicates
from keras_t5gemma.training.optimizers.low_precision import is_bfloat16
from keras_t5gemma.training.optimizers.stochastic_rounding import nearest_bfloat16, random_bits, stochastic_round


def update(optimizer, grads, variables, learning_rate):
    """Updates all variables.

    Args:
        optimizer: an `AdamW`, within its update.
        grads: one per variable: float32 for float32 variables, any dtype for bfloat16 ones; `tf.IndexedSlices` for the
            rows that were looked up in a table.
        variables: `keras.Variable`s.
        learning_rate: a scalar.
    """
    import tensorflow as tf

    updates = optimizer.tensorflow_updates
    local_step = tf.cast(tf.convert_to_tensor(optimizer.iterations) + 1, "float32")
    corrections = tf.sqrt(1 - optimizer.beta_2**local_step) / (1 - optimizer.beta_1**local_step)
    learning_rate = tf.cast(learning_rate, "float32")
    previous = []
    # In reverse order, and one after the other: the last weights' gradients are computed first, and their memory is
    # freed before the others are computed.
    for grad, variable in reversed(list(zip(grads, variables, strict=True))):
        index = optimizer._get_variable_index(variable)
        states = [variable, optimizer._momentums[index], optimizer._velocities[index]]
        tensors = [state.value for state in states]
        factors = learning_rate * corrections, learning_rate * optimizer.decay_of(variable)
        with tf.control_dependencies(previous):
            if is_bfloat16(variable):
                master = optimizer._master_weights[index]
                keys = [optimizer.key_of(state) if is_bfloat16(state) else None for state in states]
                scale = 1.0 if optimizer._clip_scale is None else optimizer._clip_scale
                copy = None if master is None else master.value
                last = updates.bfloat16(*tensors, copy, *factors, scale, keys, *_rows(float32_gradient(grad)))
            elif isinstance(grad, tf.IndexedSlices):
                last = updates.rows(*tensors, *factors, *_rows(without_duplicates(grad)))
            else:
                last = updates.dense(*tensors, *factors, grad)
        previous = [last]


class Updates:
    """The compiled functions of one optimizer.

    Args:
        optimizer: an `AdamW`.
    """

    def __init__(self, optimizer):
        self.beta_1, self.beta_2, self.epsilon = optimizer.beta_1, optimizer.beta_2, optimizer.epsilon

    @functools.cached_property
    def dense(self):
        """The update of a float32 weight with a dense gradient."""
        import tensorflow as tf

        @tf.function(jit_compile=True, autograph=False)
        def update(variable, momentum, velocity, alpha, decay, grad):
            momentum.assign_add((grad - momentum) * (1 - self.beta_1))
            velocity.assign_add((tf.square(grad) - velocity) * (1 - self.beta_2))
            variable.assign(self._stepped(variable, momentum, velocity, alpha, decay))
            return alpha

        return update

    @functools.cached_property
    def rows(self):
        """The update of a float32 table of which only some rows have a gradient, without a gradient of its size."""
        import tensorflow as tf

        @tf.function(jit_compile=True, autograph=False)
        def update(variable, momentum, velocity, alpha, decay, rows, ids):
            momentum.assign(_averaged_rows(momentum, rows, ids, self.beta_1))
            velocity.assign(_averaged_rows(velocity, tf.square(rows), ids, self.beta_2))
            variable.assign(self._stepped(variable, momentum, velocity, alpha, decay))
            return alpha

        return update

    @functools.cached_property
    def bfloat16(self):
        """The update of a bfloat16 weight, in float32, with a dense gradient or with rows."""
        import tensorflow as tf

        @tf.function(jit_compile=True, autograph=False)
        def update(variable, momentum, velocity, master, alpha, decay, scale, keys, grad, ids):
            weight, first, second = (tf.cast(state, "float32") for state in (variable, momentum, velocity))
            if master is not None:
                weight = tf.where(nearest_bfloat16(tf.convert_to_tensor(master)) == weight, master, weight)
            grad = grad * scale
            if ids is None:
                first = first + (grad - first) * (1 - self.beta_1)
                second = second + (tf.square(grad) - second) * (1 - self.beta_2)
            else:
                first = _averaged_rows(first, grad, ids, self.beta_1)
                second = _averaged_rows(second, tf.square(grad), ids, self.beta_2)
            weight = self._stepped(weight, first, second, alpha, decay)
            if master is not None:
                master.assign(weight)
                variable.assign(tf.cast(nearest_bfloat16(weight), "bfloat16"))
            values = zip((variable, momentum, velocity), (weight, first, second), keys, strict=True)
            for state, value, key in list(values)[0 if master is None else 1 :]:
                state.assign(value if key is None else stochastic_round(value, random_bits(value.shape, key)))
            return alpha

        return update

    def _stepped(self, variable, momentum, velocity, alpha, decay):
        """The new value of a weight; `alpha` and `decay` include the learning rate."""
        import tensorflow as tf

        return variable - variable * decay - momentum * alpha / (tf.sqrt(velocity) + self.epsilon)


def _rows(grad):
    """`(rows, ids)` of a lookup's gradient; `(gradient, None)` of a dense one."""
    import tensorflow as tf

    return (grad.values, grad.indices) if isinstance(grad, tf.IndexedSlices) else (grad, None)


def _averaged_rows(state, rows, ids, beta):
    """A moving average [V, D] after a gradient whose rows [m, D] belong to the ids [m], and are zero elsewhere."""
    import tensorflow as tf

    return tf.tensor_scatter_nd_add(state - state * (1 - beta), tf.expand_dims(ids, -1), rows * (1 - beta))
