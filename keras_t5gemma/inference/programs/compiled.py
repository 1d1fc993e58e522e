"""A function of tensors as one program, compiled if the backend compiles."""

import contextlib
import threading
import weakref

import keras
from keras import ops, tree

from keras_t5gemma._keras_internals import tensor_of

# Weights from which TensorFlow has XLA compile decoding loops on a CPU: of Small-Small a step takes half the time, and
# of a model of a few thousand weights nothing comes back of what compiling takes.
_WEIGHTS_FOR_XLA = 10_000_000


def by_xla(model):
    """Whether TensorFlow is to compile decoding loops by XLA where Keras's "auto" would not.

    Args:
        model: a `keras.Model` whose `jit_compile_is_auto` says that the user did not ask for it.
    """
    return model.jit_compile_is_auto and model.count_params() >= _WEIGHTS_FOR_XLA


# One thread at a time traces and compiles: others would do the same work again beside it.
_COMPILING = threading.RLock()


# Programs for different options that are kept. More are a sign of options made anew for each call.
MOST_PROGRAMS = 64


class Programs:
    """The newest programs of a model by their keys, which begin with the kind; safe to ask from several threads.

    Args:
        most: how many are kept; the oldest goes first.
    """

    def __init__(self, most=MOST_PROGRAMS):
        self._most = most
        self._made = {}
        self._lock = threading.RLock()  # one program may be made of others

    def get(self, key, make):
        """The one for a key, made by `make()` if there is none."""
        with self._lock:
            if key not in self._made:
                program = make()  # before there is room for it: it may ask for others
                while len(self._made) >= self._most:
                    del self._made[next(iter(self._made))]
                self._made[key] = program
            return self._made[key]

    def values(self, kind=None):
        """A list of all programs, or of those whose key begins with `kind`."""
        with self._lock:
            return [program for key, program in self._made.items() if kind in (None, key[0])]

    def __len__(self):
        return len(self._made)


class Program:
    """A function that reads a model's variables: compiled on JAX and TensorFlow, without gradients on PyTorch.

    What keras-hub does with `generate` as a whole, for any part of it. Weights are arguments of the compiled program,
    not constants in it: they may change between two calls.

    Args:
        function: `(*arguments) -> outputs`, nested structures of tensors.
        model: the `keras.Model` whose variables it reads, and whose `run_eagerly` and `jit_compile` say how to compile.
        seeds: a list of further variables, a sampler's, whose values each call brings with it and gets back: calls
            that run at the same time do not share them.
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
        self._known_shapes = set()

    def __call__(self, *arguments, seeds=None):
        """The function's outputs.

        Args:
            *arguments: nested structures of arrays, numbers or tensors.
            seeds: if the program has seeds, a list of their values at the start, int [2] each.

        Returns:
            The outputs, or with seeds `(outputs, seeds)`: a list of their values at the end.
        """
        arguments = tree.map_structure(tensor_of, arguments)
        values = [] if seeds is None else [ops.convert_to_tensor(value) for value in seeds]
        run = _RUNS.get(keras.config.backend(), Program._function_with_seeds)
        if self._model.run_eagerly or run not in _COMPILING_RUNS:
            outputs, values = run(self, values, arguments)
        else:
            shapes = tuple((x.shape, str(x.dtype)) for x in tree.flatten(arguments))
            is_new = shapes not in self._known_shapes
            with _COMPILING if is_new else contextlib.nullcontext():
                outputs, values = run(self, values, arguments, is_new)
            self._known_shapes.add(shapes)
        return outputs if seeds is None else (outputs, values)

    def _function_with_seeds(self, seeds, arguments):
        if not self._seeds:
            return self._function(*arguments), []
        with keras.StatelessScope(state_mapping=list(zip(self._seeds, seeds, strict=True))) as scope:
            outputs = self._function(*arguments)
        return outputs, [scope.get_current_value(seed) for seed in self._seeds]

    def _run_torch(self, seeds, arguments):
        import torch

        # Here, and not around a loop over chunks: what its user does between two of them may need gradients.
        with torch.no_grad():
            return self._function_with_seeds(seeds, arguments)

    def _run_tensorflow(self, seeds, arguments, is_new=False):
        """Runs as a `tf.function`, traced again if the model has other variables by now."""
        import tensorflow as tf

        if self._model.run_eagerly:
            return self._function_with_seeds(seeds, arguments)
        # A `tf.function` knows the variables it was made with. Others take their place when a model is quantized or
        # gets LoRA; the program, which keeps the old ones' memory, goes with the first of them.
        variables = self._variables()
        with _COMPILING:
            known = [reference() for reference in self._compiled_for]
            if self._compiled is None or list(map(id, known)) != list(map(id, variables)):
                jit_compile = self._model.jit_compile or (self._decodes and by_xla(self._model))
                self._compiled = tf.function(self._function_with_seeds, jit_compile=jit_compile)
                self._compiled_for = [weakref.ref(variable, self._forget) for variable in variables]
                self._known_shapes.clear()
            compiled = self._compiled
        if is_new:
            # A program of its own per shape is meant. Traced by the call, it would count as one too many, and
            # TensorFlow would warn of that.
            compiled.get_concrete_function(seeds, arguments)
        return compiled(seeds, arguments)

    def _forget(self, _):
        self._compiled = None

    def _run_jax(self, seeds, arguments, is_new=False):  # noqa: ARG002 for TensorFlow's
        """Runs under `jax.jit`, with the variables' values as arguments."""
        if self._model.run_eagerly:
            return self._function_with_seeds(seeds, arguments)
        if self._compiled is None:
            import jax

            donated = tuple(range(2, 2 + self._donated))
            self._compiled = jax.jit(self._with_variables, donate_argnums=donated)
        # `.value` keeps how a variable lies on several devices.
        return self._compiled([variable.value for variable in self._variables()], seeds, *arguments)

    def _with_variables(self, values, seeds, *arguments):
        variables, values = [*self._variables(), *self._seeds], [*values, *seeds]
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))) as scope:
            outputs = self._function(*arguments)
        return outputs, [scope.get_current_value(seed) for seed in self._seeds]

    def _variables(self):
        return [*self._model.trainable_variables, *self._model.non_trainable_variables]


_RUNS = {"jax": Program._run_jax, "tensorflow": Program._run_tensorflow, "torch": Program._run_torch}
_COMPILING_RUNS = (Program._run_jax, Program._run_tensorflow)
