"""Gives a model's training steps access to a teacher that is not part of the model."""

import contextlib

from keras_t5gemma.training.steps.accumulation import steps_are_functions


class Taught:
    """For a `keras.Model` that may be compiled with `Distillation`: its programs carry the teacher while they run.

    JAX's steps are functions of the variables that Keras counts as the model's; any others would be constants of the
    compiled program, a second copy of the teacher. So while `fit` and `evaluate` run, and only then, the teacher's are
    counted among those that are not trained. Nothing that saves, exports or counts parameters sees them. The other
    backends need no such thing.
    """

    _carries_teacher = False

    @property
    def non_trainable_variables(self):
        """The model's; while its programs run, the teacher's, too."""
        own = super().non_trainable_variables
        if not self._carries_teacher:
            return own
        # A teacher may share some with its student.
        seen = {id(variable) for variable in self.variables}
        return own + [variable for variable in self._teacher_variables() if id(variable) not in seen]

    def get_state_tree(self, *args, **kwargs):
        """What Keras's own checkpoints save: without the teacher."""
        with self._carrying_teacher(False):
            return super().get_state_tree(*args, **kwargs)

    def fit(self, *args, **kwargs):
        """As in Keras."""
        with self._carrying_teacher():
            return super().fit(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """As in Keras."""
        with self._carrying_teacher():
            return super().evaluate(*args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        """As in Keras."""
        with self._carrying_teacher():
            return super().train_on_batch(*args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        """As in Keras."""
        with self._carrying_teacher():
            return super().test_on_batch(*args, **kwargs)

    def _teacher_variables(self):
        loss = getattr(self, "loss", None)
        teacher = getattr(loss, "teacher", None)
        return [] if teacher is None else list(teacher.variables)

    @contextlib.contextmanager
    def _carrying_teacher(self, carries=True):
        before = self._carries_teacher
        teacher = self._teacher_variables() if carries and not before and steps_are_functions() else []
        values = [variable.value for variable in teacher]
        self._carries_teacher = carries and (before or bool(teacher))
        try:
            yield
        except BaseException:
            # Keras takes the values out of their variables while it steps, and a step that failed does not put them
            # back. What was handed over to a step that ran is gone for good, and the newest state has been put back.
            for variable, value in zip(teacher, values, strict=True):
                if not value.is_deleted():
                    variable.assign(value)
            raise
        finally:
            self._carries_teacher = before
