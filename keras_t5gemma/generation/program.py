"""A function of tensors as one program, compiled where the backend compiles."""

import weakref

import keras
from keras import ops, tree

# Weights from which TensorFlow has XLA compile decoding loops on a CPU: of Small-Small a step takes half the time, and
# of a model of a few thousand weights nothing comes back of what compiling takes.
_WEIGHTS_FOR_XLA = 10_000_000


def by_xla(model):
    """Whether TensorFlow is to compile decoding loops by XLA where Keras's "auto" would not.

    Args:
        model: a `keras.Model` whose `jit_compile_is_auto` says that nobody asked for it, or for none.
    """
    return model.jit_compile_is_auto and model.count_params() >= _WEIGHTS_FOR_XLA


class Program:
    """A function that reads a model's variables: compiled on JAX and TensorFlow, without gradients on PyTorch.

    What keras-hub does with `generate` as a whole, for any part of it. Weights are arguments of the compiled program,
    not constants in it: they may change between two calls.

    Args:
        function: `(*arguments) -> outputs`, nested structures of tensors.
        model: the `keras.Model` whose variables it reads, and whose `run_eagerly` and `jit_compile` say how to compile.
        seeds: a list of further variables, which it changes too, e.g. a sampler's.
        donated: how many of the first arguments may be overwritten; the caller does not use these again.
        decodes: whether it is a loop of decoding steps, which TensorFlow hands to XLA on a CPU too, see `by_xla`.
    """

    def __init__(self, function, model, *, seeds=(), donated=0, decodes=False):
        self._function = function
        self._model = model
        self._seeds = seeds
        self._donated = donated
        self._decodes = decodes
        self._compiled = None
        self._compiled_for = []

    def __call__(self, *arguments):
        """The function's outputs.

        Args:
            *arguments: nested structures of arrays, numbers or tensors.
        """
        arguments = tree.map_structure(ops.convert_to_tensor, arguments)
        run = _RUNS.get(keras.config.backend())
        return self._function(*arguments) if run is None else run(self, arguments)

    def _run_torch(self, arguments):
        import torch

        # Here, and not around a loop over chunks: what its user does between two of them may need gradients.
        with torch.no_grad():
            return self._function(*arguments)

    def _run_tensorflow(self, arguments):
        import tensorflow as tf

        if self._model.run_eagerly:
            return self._function(*arguments)
        # A `tf.function` knows the variables it was made with. Others take their place when a model is quantized or
        # gets LoRA; the program, which keeps the old ones' memory, goes with the first of them.
        variables = self._variables()
        known = [reference() for reference in self._compiled_for]
        if list(map(id, known)) != list(map(id, variables)):
            jit_compile = self._model.jit_compile or (self._decodes and by_xla(self._model))
            self._compiled = tf.function(self._function, jit_compile=jit_compile)
            self._compiled_for = [weakref.ref(variable, self._forget) for variable in variables]
        return self._compiled(*arguments)

    def _forget(self, _):
        self._compiled = None

    def _run_jax(self, arguments):
        if self._model.run_eagerly:
            return self._function(*arguments)
        if self._compiled is None:
            import jax

            donated = tuple(range(1, 1 + self._donated))
            self._compiled = jax.jit(self._with_variables, donate_argnums=donated)
        # `.value` keeps how a variable lies on several devices.
        outputs, seeds = self._compiled([variable.value for variable in self._variables()], *arguments)
        for variable, value in zip(self._seeds, seeds, strict=True):
            variable.assign(value)
        return outputs

    def _with_variables(self, values, *arguments):
        with keras.StatelessScope(state_mapping=list(zip(self._variables(), values, strict=True))) as scope:
            outputs = self._function(*arguments)
        return outputs, [scope.get_current_value(seed) for seed in self._seeds]

    def _variables(self):
        return [*self._model.trainable_variables, *self._model.non_trainable_variables, *self._seeds]


_RUNS = {"jax": Program._run_jax, "tensorflow": Program._run_tensorflow, "torch": Program._run_torch}
