"""A function of tensors as one program, compiled if the backend compiles."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable

import keras
from keras import ops, tree

from keras_t5gemma._keras_internals import tensor_of

# The number of weights from which TensorFlow compiles decoding loops by XLA on a CPU. A step of Small-Small then takes
# half the time; a model of a few thousand weights never earns back the time to compile.
_WEIGHTS_FOR_XLA = 10_000_000


def by_xla(model: keras.Model) -> bool:
    """Whether TensorFlow compiles decoding loops by XLA although Keras's "auto" would not.

    Args:
        model: a `keras.Model` whose `jit_compile_is_auto` says that the user did not set `jit_compile`.
    """
    return model.jit_compile_is_auto and model.count_params() >= _WEIGHTS_FOR_XLA


# One thread at a time traces and compiles: concurrent threads would do the same work twice.
_COMPILING = threading.RLock()


# The number of programs that a model keeps. More are a sign of options that are created anew for each call.
MOST_PROGRAMS = 64


class Programs:
    """The newest programs of a model by key; thread-safe.

    A key is a tuple whose first item is the kind of the program.

    Args:
        most: the maximum number of programs; the oldest is dropped first.
    """

    def __init__(self, most: int = MOST_PROGRAMS):
        self._most = most
        self._programs = {}
        self._lock = threading.RLock()  # to create a program may create others

    def get(self, key: tuple[Hashable, ...], create: Callable):
        """The program for a key, created by `create()` if there is none."""
        with self._lock:
            if key not in self._programs:
                program = create()  # before the oldest are dropped: it may add others
                while len(self._programs) >= self._most:
                    del self._programs[next(iter(self._programs))]
                self._programs[key] = program
            return self._programs[key]

    def values(self, kind: str | None = None) -> list:
        """All programs, or those of one kind."""
        with self._lock:
            return [program for key, program in self._programs.items() if kind in (None, key[0])]

    def __len__(self):
        return len(self._programs)


class Program:
    """A function that reads a model's variables: compiled on JAX and TensorFlow, without gradients on PyTorch.

    keras-hub compiles `generate` as a whole; this class does the same for any part of it. Weights are arguments of the
    compiled program, not constants in it: they may change between two calls.

    Args:
        function: `(*arguments) -> outputs`, nested structures of tensors.
        model: the `keras.Model` whose variables the function reads, and whose `run_eagerly` and `jit_compile` determine
            how it is compiled.
        seeds: a list of further variables, those of a sampler. Each call passes their values in and gets them back, so
            that concurrent calls do not share them.
        donated: how many of the first arguments may be overwritten; the caller must not use these again.
        decodes: whether the function is a loop of decoding steps, which TensorFlow compiles by XLA on a CPU too; see
            `by_xla`.
    """

    def __init__(
        self,
        function: Callable,
        model: keras.Model,
        *,
        seeds: list | tuple = (),
        donated: int = 0,
        decodes: bool = False,
    ):
        self._function = function
        self._model = model
        self._seeds = seeds
        self._donated = donated
        self._decodes = decodes
        self._compiled = None
        self._compiled_for = []
        self._known_shapes = set()

    def __call__(self, *arguments, seeds=None):
        """Runs the function, and compiles it first if these shapes are new.

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

        # Here, not around a loop over chunks: the user's code between two chunks may need gradients.
        with torch.no_grad():
            return self._function_with_seeds(seeds, arguments)

    def _run_tensorflow(self, seeds, arguments, is_new=False):
        """Runs as a `tf.function`, traced again if the model has other variables by now."""
        import tensorflow as tf

        if self._model.run_eagerly:
            return self._function_with_seeds(seeds, arguments)
        # A `tf.function` captures the variables that it was traced with. Quantization and LoRA replace them. The
        # compiled function keeps the memory of the old ones, so it is dropped as soon as one of them is deleted.
        variables = self._variables()
        with _COMPILING:
            traced = [reference() for reference in self._compiled_for]
            if self._compiled is None or list(map(id, traced)) != list(map(id, variables)):
                jit_compile = self._model.jit_compile or (self._decodes and by_xla(self._model))
                # Loops are Keras's. AutoGraph would take most of the time of the first call, for nothing.
                self._compiled = tf.function(self._function_with_seeds, jit_compile=jit_compile, autograph=False)
                self._compiled_for = [weakref.ref(variable, self._forget) for variable in variables]
                self._known_shapes.clear()
            compiled = self._compiled
        if is_new:
            # One trace per shape is intended. If the call traced it, TensorFlow would count it as a retrace and warn.
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
        # `.value` keeps a variable's sharding over several devices.
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
