"""Writes checkpoints in a thread, one after the other, and removes older ones."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from keras_t5gemma.checkpoints.processes import on_all_processes, process_count
from keras_t5gemma.training.checkpointing import model_state, step_folder


class CheckpointWriter:
    """Writes one checkpoint at a time while training goes on.

    Args:
        keep: number of checkpoints that stay; None for all.

    Attributes:
        saved: the number of the last checkpoint that was handed over, in batches trained on.
        agreed: that of the last one that all processes have written.
        seconds: for how long training has waited for saving.
    """

    def __init__(self, keep: int | None):
        self.keep = keep
        self.saved = self.agreed = 0
        self.seconds = 0.0
        self._folder, self._best, self._pending = None, None, None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def begin(self, folder: Path, number: int) -> None:
        """Begins a run.

        Args:
            folder: the folder of this process.
            number: batches trained on before, up to a checkpoint that all processes have.
        """
        self._folder, self.saved, self.agreed = folder, number, number

    def write(
        self, number: int, content: Mapping, arrays: dict[str, np.ndarray], model: dict | None, best: dict | None
    ) -> None:
        """Starts to write a checkpoint. The one before must have been waited for.

        Args:
            number: batches trained on.
            content: as for `step_folder.write_step`.
            arrays: as for `step_folder.write_step`.
            model: as for `step_folder.write_step`.
            best: the entry of the best checkpoint, which is kept besides.
        """
        self.saved, self._best = number, best
        self._pending = self._executor.submit(self._write, number, content, arrays, model, best)

    def wait(self) -> None:
        """Waits for the threads of all processes, and raises the error of a thread, once."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        began = time.perf_counter()
        on_all_processes(pending.result)
        self.seconds += time.perf_counter() - began
        self.agreed = self.saved
        if process_count() > 1:
            # Only now: until all have written, the oldest checkpoint may be the only one that all have.
            self._prune(self._best)

    def not_finite(self, reason: str) -> FloatingPointError:
        """The error of numbers that are not finite. It names the last good checkpoint."""
        steps = step_folder.steps_in(self._folder)
        good = f"The last good checkpoint is {steps[-1]}." if steps else "No checkpoint was saved before."
        return FloatingPointError(f"{reason} {good}")

    def _write(self, number, content, arrays, model, best) -> None:
        try:
            model_state.check_finite(arrays, model)
        except FloatingPointError as error:
            raise self.not_finite(f"{error} It was to be saved after batch {number}.") from None
        step_folder.write_step(self._folder, number, content, arrays, model)
        if process_count() == 1:
            self._prune(best)

    def _prune(self, best: dict | None) -> None:
        if self.keep is not None:
            step_folder.prune(self._folder, self.keep, spared=best and best["step"])
