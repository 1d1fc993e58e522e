"""`OwnSteps`: gives a model this package's training and evaluation steps."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import keras

from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.training.optimizers.checks import check_optimizer, warn_of_quantized_weights
from keras_t5gemma.training.steps.accumulation import Accumulation

PACKAGE = __name__.rpartition(".")[0]


class TaughtBatch(NamedTuple):
    """What a step on JAX gets if the loss has a teacher.

    Attributes:
        batch: `(x, y, sample_weight)`.
        values: those of `teacher_variables`, in their order.
    """

    batch: Any
    values: list


class OwnSteps:
    """Mixed into a `keras.Model`: `fit` and `evaluate` run the steps of this package.

    Attributes:
        accumulation: the `Accumulation` of a training step.
        trains_without_logits: whether `compute_loss` takes None for the outputs, and runs the model itself.
        keeps_own_loss: whether the model has a mean of the losses of its own, which `track_own_loss` updates, instead
            of Keras's.
        compares_rows: whether the loss compares rows of a batch with each other. The model then has `outputs_of(x,
            training)`, and its `compute_loss` takes their gradients, `{GRADIENTS: ...}`, for y; see `accumulation`.
    """

    accumulation: Accumulation = Accumulation(1, None)
    trains_without_logits: bool = False
    keeps_own_loss: bool = False
    compares_rows: bool = False
    _frozen: frozenset[int] = frozenset()  # the `id`s of variables

    def fit(self, *args, **kwargs):
        """As in Keras. What was frozen meanwhile is released at the end, and after an error."""
        try:
            return super().fit(*args, **kwargs)
        finally:
            if self._frozen:
                self._frozen, self.train_function = frozenset(), None

    def train_step(self, *args):
        """One step of `fit`, with Keras's arguments and result for the backend: `(state, data)` on JAX, `data` else."""
        return implementation(PACKAGE).train_step(self, *args)

    def test_step(self, *args):
        """One step of `evaluate`, with Keras's arguments and result for the backend."""
        return implementation(PACKAGE).test_step(self, *args)

    def freeze_during_fit(self, variables: Iterable[keras.Variable]) -> None:
        """Has the steps of this `fit` leave some trainable variables as they are, until the next call.

        The optimizer sees their gradients and keeps its state for them all the same.

        Args:
            variables: `keras.Variable`s; none of them to release all.
        """
        self._frozen = frozenset(map(id, variables))
        self.make_train_function(force=True)

    def is_frozen_during_fit(self, variable: keras.Variable) -> bool:
        """Whether steps leave a variable as it is."""
        return id(variable) in self._frozen

    def make_train_function(self, force: bool = False) -> None:
        """Keras's own, compiled anew if `force`, after a check that the optimizer can train the weights.

        `compile` does not check this, because LoRA may freeze the weights in question afterwards.

        Raises:
            ValueError: if the optimizer cannot train the weights, see `check_optimizer`.
        """
        if self.train_function is None or force:
            check_optimizer(self.optimizer, self.trainable_variables)
            warn_of_quantized_weights(self)
            if not self.optimizer.built:
                # On TensorFlow, Keras builds it in the first step, which would then be traced twice.
                strategy = getattr(self, "distribute_strategy", None)
                with strategy.scope() if strategy else contextlib.nullcontext():
                    self.optimizer.build(self.trainable_variables)
            with _of_its_own(self, "train_step"):
                super().make_train_function(force)
            self.train_function = self._with_teacher(self.train_function)

    def make_test_function(self, force: bool = False) -> None:
        """Keras's own test function, compiled anew if `force`."""
        if self.test_function is None or force:
            with _of_its_own(self, "test_step"):
                super().make_test_function(force)
            self.test_function = self._with_teacher(self.test_function)

    def get_compile_config(self) -> dict | None:
        """The arguments of `compile`, JSON-ready; None if the model is not compiled."""
        if not self.compiled:
            return None
        config = super().get_compile_config()
        return config if self.accumulation.steps == 1 else {**config, "accumulation_steps": self.accumulation.steps}

    def compile_from_config(self, config: Mapping) -> None:
        """Compiles the model from `get_compile_config`, and builds the optimizer if its state was saved."""
        config = {name: keras.saving.deserialize_keras_object(value) for name, value in config.items()}
        is_built = config.pop("optimizer_is_built", True)
        self.compile(**config)
        if is_built:
            self.optimizer.build(self.trainable_variables)

    @property
    def teacher_variables(self) -> list[keras.Variable]:
        """A teacher's variables that are not the model's, too."""
        teacher = getattr(getattr(self, "loss", None), "teacher", None)
        own = {id(variable) for variable in self.variables}
        return [variable for variable in getattr(teacher, "variables", ()) if id(variable) not in own]

    def _with_teacher(self, function: Callable) -> Callable:
        """A train or test function whose batches carry the values of the teacher's variables on JAX.

        A step is a function of its arguments there: any other values would be constants of the compiled program, a
        second copy of the teacher.
        """
        variables = self.teacher_variables if implementation(PACKAGE).STEPS_ARE_FUNCTIONS else []
        if not variables:
            return function

        def function_of_taught_batches(state, batches):
            values = [variable.value for variable in variables]
            return function(state, (TaughtBatch(batch, values) for batch in batches))

        return function_of_taught_batches


def unpacked(model, data):
    """A step's `data`, a `TaughtBatch` or a batch.

    Returns:
        `((x, y, sample_weight), teacher)`, the latter `[(variable, value), ...]`.
    """
    teacher = []
    if isinstance(data, TaughtBatch):
        data, teacher = data.batch, list(zip(model.teacher_variables, data.values, strict=True))
    return keras.utils.unpack_x_y_sample_weight(data), teacher


@contextlib.contextmanager
def _of_its_own(model: keras.Model, name: str) -> Iterator[None]:
    """A context in which a model's step is a function that was not there before.

    `jax.jit` has one compiled program per function and shapes: that of another loss, say, or of frozen variables, if
    the function were the same.
    """
    own = vars(model).get(name)
    setattr(model, name, functools.partial(getattr(model, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(model, name)
        else:
            setattr(model, name, own)
