"""The weights at the start of a run, and the log-probabilities of answers by them."""

from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_t5gemma._keras_internals import tensor_of, variable_array
from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.reinforcement.policy import answer_log_probs
from keras_t5gemma.reinforcement.rollouts import Rollout
from keras_t5gemma.training.checkpointing import step_folder
from keras_t5gemma.training.checkpointing.shards import SavedArrays


class Reference:
    """A copy of the trainable weights, under which the rest of the model computes log-probabilities, without dropout.

    With LoRA these are the adapters alone, a few MB. Otherwise the copy takes the memory of all trainable weights.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
    """

    def __init__(self, lm):
        self._lm = lm
        self._variables = list(lm.trainable_variables)
        # Copies: a step overwrites the variables' own arrays.
        self._values = [ops.stop_gradient(ops.copy(variable)) for variable in self._variables]
        self._program = Program(self._log_probs, lm)

    def log_probs(self, rollout: Rollout) -> np.ndarray:
        """The log-probabilities of the labels of a rollout, float32 [B, n, T]."""
        log_probs = self._program(self._values, rollout.inputs, rollout.labels)
        return np.reshape(ops.convert_to_numpy(log_probs), rollout.labels.shape)

    def save(self, folder: Path) -> None:
        """Writes the copy into a folder, for a run that resumes."""
        arrays = {
            f"reference/{position:06d}/{variable.path}": _array(value, variable)
            for position, (variable, value) in enumerate(zip(self._variables, self._values, strict=True))
        }
        step_folder.prepare(folder)
        step_folder.write_step(folder, 0, {}, arrays)

    def load(self, folder: Path) -> None:
        """Reads the copy from a folder.

        Raises:
            CheckpointError: if it is missing, damaged or of other weights.
        """
        saved = step_folder.newest(folder)
        if saved is None:
            raise CheckpointError(
                f"{folder} holds no reference weights, from which a run with `beta` measures its distance. Put the "
                f"folder back, or choose another `folder` to begin anew."
            )
        arrays = SavedArrays(*saved)
        names = arrays.names(("reference",))
        shapes = [tuple(map(int, variable.shape)) for variable in self._variables]
        if [tuple(arrays.shape(name)) for name in names] != shapes:
            raise CheckpointError(f"{folder} holds the reference weights of another model. Choose another `folder`.")
        self._values = [
            ops.cast(tensor_of(_plain(arrays.read(name))), variable.dtype)
            for name, variable in zip(names, self._variables, strict=True)
        ]

    def _log_probs(self, values, inputs, labels):
        """`answer_log_probs` with other values of the trainable variables."""
        # All variables: within a scope others would have the values that they have outside of a compiled program.
        frozen = [(variable, variable.value) for variable in self._lm.non_trainable_variables]
        with keras.StatelessScope(state_mapping=[*frozen, *zip(self._variables, values, strict=True)]):
            return answer_log_probs(self._lm, inputs, labels, training=False)


def _array(value, variable: keras.Variable) -> np.ndarray:
    """A tensor as a numpy array of its variable's dtype, which some backends return as another one."""
    array = variable_array(value)
    return np.array(array, dtype=DTYPES["BF16"] if str(variable.dtype) == "bfloat16" else array.dtype, order="C")


def _plain(array: np.ndarray) -> np.ndarray:
    """An array that every backend accepts: bfloat16 becomes float32, which is exact."""
    return array.astype("float32") if array.dtype == DTYPES["BF16"] else array
