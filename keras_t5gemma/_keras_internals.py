"""What this package uses of Keras that Keras does not promise. Checked with Keras 3.15.1 and keras-hub 0.32."""

import contextlib


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


class RestoresTrainingState:
    """Mixed into a `keras.Model`: what it takes to give variables their values back after an error on JAX.

    Where reading the first batch fails, Keras has the values in a local variable alone, and they would be lost.
    """

    _give_back = None

    def _get_jax_state(self, *, purge_model_variables=False, **groups):
        if purge_model_variables:
            variables = self.variables + self.metrics_variables
            if groups.get("optimizer_variables"):
                variables = variables + self.optimizer.variables
            values = [variable._value for variable in variables]

            def give_back():
                for variable, value in zip(variables, values, strict=True):
                    if variable._value is None and value is not None:
                        variable.assign(value)

            # A function, since Keras takes variables in lists for the model's own. A step overwrites these arrays,
            # whoever else holds them: they take no memory for longer.
            self._give_back = give_back
        return super()._get_jax_state(purge_model_variables=purge_model_variables, **groups)

    def _restore_training_state(self):
        """Variables that have no values get their last ones."""
        synchronize_training_state(self)
        if self._give_back is not None:
            self._give_back()
        if hasattr(self, "jax_state_sync"):
            self._jax_state = None


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
    return model._flatten_layers()


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
