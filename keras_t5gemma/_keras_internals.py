"""Every use of Keras internals, which may change in any release. Checked with Keras 3.15.1 and keras-hub 0.32.

Keras is imported inside the functions, because the modules that write checkpoints work without it.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras


def tensor_of(x):
    """`ops.convert_to_tensor` in the array's own dtype, with 64 bits reduced to 32.

    With a `floatx` of bfloat16, Keras on JAX converts arrays to float32 unless a dtype is passed, even token ids.
    """
    import keras
    from keras import ops

    if ops.is_tensor(x) or isinstance(x, keras.Variable):
        return ops.convert_to_tensor(x)
    x = np.asarray(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    return ops.convert_to_tensor(x, {"int64": "int32", "float64": "float32"}.get(dtype, dtype))


def synchronize_training_state(model: keras.Model) -> None:
    """Gives a model's variables their values back in the middle of a `fit`, an `evaluate` or a `predict` on JAX.

    On JAX, Keras takes the values out of the variables during a loop, so that each step can overwrite the values of the
    previous step. Only `Callback.model` puts them back. The next step then takes them from the variables again, so this
    costs no memory. On other backends the variables always have their values.

    Args:
        model: a `keras.Model`.
    """
    synchronize = getattr(model, "jax_state_sync", None)  # only JAX's trainer has it
    if synchronize is not None:
        synchronize()


def callbacks_of_the_same_fit(callback: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    """All callbacks of the `fit` that is calling a callback's `set_model` or `set_params`, in order.

    Keras does not show the other callbacks to a callback. The `CallbackList` on the call stack has them all.

    Args:
        callback: a `keras.callbacks.Callback`, whose method is being called. It is in the result.
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
    """A mixin of `keras.Model` that can give the variables their values back after an error on JAX.

    If reading the first batch fails, only a local variable of Keras holds the values, and they would be lost.
    """

    # Attributes and methods of `keras.Model`.
    variables: list
    metrics_variables: list
    optimizer: Any

    _give_back: Callable[[], None] | None = None

    def _get_jax_state(self, *, purge_model_variables: bool = False, **groups: bool) -> tuple:
        """Extends Keras's method: remembers how to give the variables their values back."""
        if purge_model_variables:
            variables = self.variables + self.metrics_variables
            if groups.get("optimizer_variables"):
                variables = variables + self.optimizer.variables
            values = [variable._value for variable in variables]

            def give_back() -> None:
                for variable, value in zip(variables, values, strict=True):
                    if variable._value is None and value is not None:
                        variable.assign(value)

            # A function, because Keras would track variables in a list as the model's own. It holds these arrays to
            # the end of the loop. A compiled step reuses their memory all the same.
            self._give_back = give_back
        keras_model: Any = super()  # `keras.Model` comes after this class in the method resolution order
        return keras_model._get_jax_state(purge_model_variables=purge_model_variables, **groups)

    def _restore_training_state(self) -> None:
        """Gives variables without values their last values."""
        model: Any = self
        synchronize_training_state(model)
        if self._give_back is not None:
            self._give_back()
        if hasattr(self, "jax_state_sync"):
            self._jax_state = None


def begin_with_epoch(model: keras.Model, epoch: int | None) -> None:
    """Sets the first epoch of a model's next `fit`; None undoes that. `BackupAndRestore` does it the same way."""
    model._initial_epoch = epoch


def global_seed_generator() -> keras.random.SeedGenerator | None:
    """Keras's generator for operations without a seed, or None if no operation has needed it yet.

    Keras's own function would create the generator, and draw from Python's `random` for it.
    """
    import keras

    internals = vars(keras)["src"]  # type checkers do not know the attribute
    return internals.backend.common.global_state.get_global_attribute("global_seed_generator")


def track_loss_in_float32(model: keras.Model) -> None:
    """Makes a compiled model sum its losses in float32. In a `floatx` of bfloat16 a sum soon stops growing."""
    import keras

    if getattr(model, "_loss_tracker", None) is not None:
        # Bypasses Keras's tracking, which would list the metric twice.
        object.__setattr__(model, "_loss_tracker", keras.metrics.Mean(name="loss", dtype="float32"))


class BuildsMetricsFirst:
    """A mixin of `keras.Model` with one output whose metrics have their variables before the first step on TensorFlow.

    Keras creates metrics that are named by strings in the first step there. A step that creates variables is traced
    twice. On other backends Keras builds them beforehand itself.
    """

    output: Any  # of `keras.Model`
    _compile_metrics: Any

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: tuple | None = None) -> None:
        """Extends Keras's method: also builds the metrics, for the shapes of the targets, without reading a batch."""
        import keras

        keras_model: Any = super()  # `keras.Model` comes after this class in the method resolution order
        keras_model._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
        metrics = self._compile_metrics
        if metrics is None or metrics.built:
            return
        dataset = getattr(iterator, "_distributed_dataset", None)  # a `tf.data.Dataset`
        batch = getattr(dataset, "element_spec", None) if data_batch is None else data_batch
        if batch is None:
            return
        _, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        if getattr(getattr(y, "shape", None), "rank", None) is not None:  # one tensor
            metrics.build(keras.KerasTensor(tuple(y.shape), y.dtype.name), self.output)


class EvaluatesWithoutOptimizer:
    """A mixin of `keras.Model` whose `evaluate` creates no optimizer state.

    Keras's `evaluate` builds the optimizer. The state of AdamW for all weights in bfloat16 takes four times the memory
    of the weights, and float16 weights are refused.
    """

    optimizer: Any  # of `keras.Model`
    trainable_variables: list

    _only_evaluates = False
    # Whether the loss takes batches of another shape than the model's inputs, and runs the model itself.
    has_no_outputs = False

    @contextlib.contextmanager
    def _only_evaluating(self) -> Iterator[None]:
        """A context in which `_symbolic_build` leaves the optimizer out."""
        before, self._only_evaluates = self._only_evaluates, True
        try:
            yield
        finally:
            self._only_evaluates = before

    def _symbolic_build(self, *args, **kwargs) -> None:
        """Extends Keras's method: hides an optimizer without state while the model is only evaluated.

        Keras runs the model and its loss on symbols, to learn the shapes of outputs. A model that has none is not run.
        """
        optimizer = self.optimizer
        if self.has_no_outputs:
            if optimizer is not None and not optimizer.built and not self._only_evaluates:
                optimizer.build(self.trainable_variables)
            return None
        keras_model: Any = super()  # `keras.Model` comes after this class in the method resolution order
        if not self._only_evaluates or optimizer is None or optimizer.built:
            return keras_model._symbolic_build(*args, **kwargs)
        self.optimizer = None
        try:
            return keras_model._symbolic_build(*args, **kwargs)
        finally:
            self.optimizer = optimizer


def variable_array(variable) -> np.ndarray:
    """A numpy array of a `keras.Variable` or a tensor.

    `keras.ops.convert_to_numpy` of a variable goes through its `__array__`, whose signature numpy 2 has deprecated.
    """
    import keras

    return np.asarray(keras.ops.convert_to_numpy(variable.value if isinstance(variable, keras.Variable) else variable))


def flatten_layers(model: keras.Model) -> list[Any]:  # Keras's type of `Layer.path` is None
    """A model's layers, nested ones included, the model itself first. Keras has no public list of them."""
    return list(model._flatten_layers())


def optimized_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable] | None:
    """The variables that an optimizer was built for, or None before it is built."""
    inner: Any = getattr(optimizer, "inner_optimizer", optimizer)  # a loss-scaling optimizer wraps another one
    return list(inner._trainable_variables) if inner.built else None


def copy_weight_decay_exclusions(source: keras.optimizers.Optimizer, target: keras.optimizers.Optimizer) -> None:
    """Copies the variables that an optimizer excludes from weight decay, which are not in its config."""
    inner_source, inner_target = (getattr(optimizer, "inner_optimizer", optimizer) for optimizer in (source, target))
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(inner_source, name):
            setattr(inner_target, name, getattr(inner_source, name))


def remove_variable(layer: keras.Layer, name: str) -> None:
    """Removes a variable from a built layer. Keras's `del layer.name` collects garbage each time, some 0.3 s."""
    layer._untrack_variable(getattr(layer, name))
    object.__delattr__(layer, name)


def forget_compiled_metrics(model: keras.Model) -> None:
    """Removes the metrics of an earlier `compile`, which Keras keeps if the next one has none."""
    if getattr(model, "_compile_metrics", None) is not None:
        object.__setattr__(model, "_compile_metrics", None)


@contextlib.contextmanager
def short_garbage_collections():
    """A context in which collecting garbage looks only at objects made within it.

    Keras collects for each variable that it deletes, and so for each layer that it quantizes: 0.2 to 0.5 s each, as
    long as all of the program's objects are looked at. The deleted variables are in no cycle and need no collection.
    """
    was_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:  # what the program froze stays frozen
            gc.unfreeze()
