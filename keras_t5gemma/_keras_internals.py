"""What this package uses of Keras that Keras does not promise. Checked with Keras 3.15.1 and keras-hub 0.32.

Keras is imported where it is needed: what writes checkpoints goes without.
"""

import contextlib
import gc
import sys


def tensor_of(x):
    """`ops.convert_to_tensor` in an array's own dtype, 64 bits as 32.

    With a `floatx` of bfloat16, Keras on JAX turns arrays into float32 unless a dtype is given; token ids, too.
    """
    import keras
    import numpy as np
    from keras import ops

    if ops.is_tensor(x) or isinstance(x, keras.Variable):
        return ops.convert_to_tensor(x)
    x = np.asarray(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    return ops.convert_to_tensor(x, {"int64": "int32", "float64": "float32"}.get(dtype, dtype))


def synchronize_training_state(model):
    """Gives a model's variables their values back in the middle of a `fit`, an `evaluate` or a `predict` on JAX.

    There Keras takes the values out of the variables for the time of a loop, so that each step can overwrite those of
    the one before, and `Callback.model` alone puts them back. Once they are back, the next step takes them from the
    variables again, so that memory is as before. On other backends variables always have their values.

    Args:
        model: a `keras.Model`.
    """
    synchronize = getattr(model, "jax_state_sync", None)  # of JAX's trainer alone
    if synchronize is not None:
        synchronize()


def callbacks_of_the_same_fit(callback):
    """All callbacks of the `fit` that calls this one's `set_model` or `set_params`, in their order, itself included.

    Keras tells no callback of the others. The `CallbackList` that calls it has them all.

    Args:
        callback: a `keras.callbacks.Callback`, whose method is being called.
    """
    import keras

    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList) and callback in caller.callbacks:
            return list(caller.callbacks)
        frame = frame.f_back
    return [callback]


class RestoresTrainingState:
    """Mixed into a `keras.Model`: what it takes to give variables their values back after an error on JAX.

    Where reading the first batch fails, Keras has the values in a local variable alone, and they would be lost.
    """

    _give_back = None

    def _get_jax_state(self, *, purge_model_variables=False, **groups):
        """As Keras's, and remembers how to give the variables their values back."""
        if purge_model_variables:
            variables = self.variables + self.metrics_variables
            if groups.get("optimizer_variables"):
                variables = variables + self.optimizer.variables
            values = [variable._value for variable in variables]

            def give_back():
                for variable, value in zip(variables, values, strict=True):
                    if variable._value is None and value is not None:
                        variable.assign(value)

            # A function, since Keras takes variables in lists for the model's own. It holds these arrays to the end of
            # the loop. A compiled step reuses their memory all the same.
            self._give_back = give_back
        return super()._get_jax_state(purge_model_variables=purge_model_variables, **groups)

    def _restore_training_state(self):
        """Variables that have no values get their last ones."""
        synchronize_training_state(self)
        if self._give_back is not None:
            self._give_back()
        if hasattr(self, "jax_state_sync"):
            self._jax_state = None


def begin_with_epoch(model, epoch):
    """Has a model's next `fit` begin with an epoch; None takes that back. `BackupAndRestore` does it the same way."""
    model._initial_epoch = epoch


def global_seed_generator():
    """Keras's generator for operations that are given no seed, or None if nothing has asked for it yet.

    Asking the function that makes it would draw from Python's `random`.
    """
    import keras

    return keras.src.backend.common.global_state.get_global_attribute("global_seed_generator")


def track_loss_in_float32(model):
    """Has a compiled model sum its losses in float32. In a `floatx` of bfloat16 a sum soon stops growing."""
    import keras

    if getattr(model, "_loss_tracker", None) is not None:
        # Past Keras's bookkeeping, which would list it twice.
        object.__setattr__(model, "_loss_tracker", keras.metrics.Mean(name="loss", dtype="float32"))


class EvaluatesWithoutOptimizer:
    """Mixed into a `keras.Model`: `evaluate` makes no state of an optimizer.

    Keras's builds it: of AdamW for all weights in bfloat16 four times their memory, and float16 weights are refused.
    """

    _only_evaluates = False

    @contextlib.contextmanager
    def _only_evaluating(self):
        before, self._only_evaluates = self._only_evaluates, True
        try:
            yield
        finally:
            self._only_evaluates = before

    def _symbolic_build(self, *args, **kwargs):
        """As Keras's, without an optimizer that has no state yet if the model is only evaluated."""
        optimizer = self.optimizer
        if not self._only_evaluates or optimizer is None or optimizer.built:
            return super()._symbolic_build(*args, **kwargs)
        self.optimizer = None
        try:
            return super()._symbolic_build(*args, **kwargs)
        finally:
            self.optimizer = optimizer


def variable_array(variable):
    """A numpy array of a `keras.Variable` or a tensor.

    `keras.ops.convert_to_numpy` of a variable goes through its `__array__`, whose signature numpy 2 has deprecated.
    """
    import keras

    return keras.ops.convert_to_numpy(variable.value if isinstance(variable, keras.Variable) else variable)


def flatten_layers(model):
    """A model's layers, nested ones included, the model itself first. Keras lists them in no public way."""
    return list(model._flatten_layers())


def optimized_variables(optimizer):
    """The variables that an optimizer was built for, or None before it is built."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
    return list(optimizer._trainable_variables) if optimizer.built else None


def copy_weight_decay_exclusions(source, target):
    """Excludes from an optimizer's weight decay what another one excludes, which its config does not say."""
    source, target = (getattr(optimizer, "inner_optimizer", optimizer) for optimizer in (source, target))
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


def remove_variable(layer, name):
    """Removes a variable from a built layer. Keras's `del layer.name` collects garbage each time, some 0.3 s."""
    layer._untrack_variable(getattr(layer, name))
    object.__delattr__(layer, name)


@contextlib.contextmanager
def short_garbage_collections():
    """A context in which collecting garbage looks only at objects made within it.

    Keras collects for each variable that it deletes, and so for each layer that it quantizes: 0.2 to 0.5 s each, as
    long as all of the program's objects are looked at. The deleted variables are in no cycle and need no collection.
    """
    if gc.get_freeze_count():  # what the program froze must stay frozen
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
