"""The saved states and the log of a run that learns from rewards."""

import json
from pathlib import Path

import keras

from keras_t5gemma.checkpoints.processes import process_count
from keras_t5gemma.reinforcement.policy import Policy
from keras_t5gemma.reinforcement.reference import Reference
from keras_t5gemma.training.callbacks.log_file import LOG_FILE, LogTable
from keras_t5gemma.training.checkpointing import model_state, random_state, step_folder

REFERENCE_FOLDER = "reference"


class RunFolder:
    """A folder of saved states, as `TrainingCheckpoint` writes them, with `log.csv`.

        step_00000100/          weights, optimizer, random states; each file with its checksum
        reference/              the weights at the start, if the loss measures the distance from them
        log.csv                 a row per step

    Args:
        folder: the path.
        policy: the `Policy`, whose optimizer is built.
        reference: the `Reference`, or None.
        options: what determines the run, JSON-ready; a run resumes only with the same.
        save_every: steps between two states.
        keep: the number of newest states to keep; None for all.

    Raises:
        CheckpointError: if the newest state is damaged or of another model, or the folder cannot be written to.
        ValueError: if the run has other options, or there are several processes.

    Attributes:
        step: steps that the run has made; their state is restored.
    """

    def __init__(
        self,
        folder: str | Path,
        policy: Policy,
        reference: Reference | None,
        options: dict,
        *,
        save_every: int,
        keep: int | None,
    ):
        if process_count() > 1:
            raise ValueError(
                f"`folder` is available in one process, and {process_count()} are connected. Leave it out, and save "
                f"the weights yourself."
            )
        self.folder, self._policy, self._save_every, self._keep = Path(folder), policy, save_every, keep
        self._options = json.loads(json.dumps(options))
        self.step = self._saved = 0
        step_folder.prepare(folder)
        newest = step_folder.newest(folder)
        if newest is not None:
            self._restore(*newest)
        if reference is not None:
            (reference.save if newest is None else reference.load)(self.folder / REFERENCE_FOLDER)
        self._log = LogTable(self.folder / LOG_FILE, self.step)

    def after_step(self, step: int, row: dict[str, float], is_last: bool) -> None:
        """Logs a step, and saves the state if that is due.

        Args:
            step: the step, from 1.
            row: its numbers.
            is_last: whether no other step follows.

        Raises:
            FloatingPointError: if a weight to save is not finite; the message names the last good state.
        """
        self._log.add({"step": step, **row})
        self.step = step
        if is_last or step % self._save_every == 0:
            self._save()

    def last_good(self) -> str:
        """A sentence about the newest state, for errors."""
        steps = step_folder.steps_in(self.folder)
        return f"The last saved state is {steps[-1]}." if steps else "No state was saved before."

    def _save(self) -> None:
        layout, arrays, model = model_state.host_copy(self._policy)
        try:
            model_state.check_finite(arrays, model)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} It was to be saved after step {self.step}. {self.last_good()}") from None
        content = {
            "reinforce": self._options,
            "random": random_state.random_state(),
            "run": model_state.description(self._policy),
            "keras": keras.__version__,
            "backend": keras.config.backend(),
            **layout,
        }
        step_folder.write_step(self.folder, self.step, content, arrays, model)
        if self._keep is not None:
            step_folder.prune(self.folder, self._keep)

    def _restore(self, path: Path, content: dict) -> None:
        before = content.get("reinforce")
        if before is None:
            raise ValueError(
                f"{path} is of a run that did not learn from rewards, e.g. of `fit`. Choose another `folder`; "
                f"`load_training_weights` loads its weights."
            )
        for name, value in self._options.items():
            if before.get(name) != value:
                raise ValueError(
                    f"`{name}` was {before.get(name)!r} in the run of {path}, and is {value!r}. Pass the same to "
                    f"resume the run, or choose another `folder` to begin anew."
                )
        model_state.check(self._policy, content["run"], path)
        model_state.restore(self._policy, path, content)
        random_state.set_random_state(content["random"])
        self.step = step_folder.step_of(path)
