"""The epoch of a run with the best value of a metric."""

import math
from collections.abc import Mapping
from pathlib import Path

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.suggestions import check_choice
from keras_t5gemma.training.checkpointing import step_folder

# In the names of values that are better the smaller they are.
_SMALLER_IS_BETTER = ("loss", "perplexity", "error")


class BestEpoch:
    """Compares the logs of epochs.

    Args:
        monitor: the name of a value in the logs, or None to compare nothing.
        mode: "min", "max", or "auto", which goes by the name.

    Raises:
        ValueError: if an argument is invalid.
    """

    def __init__(self, monitor: str | None, mode: str):
        if monitor is not None and not isinstance(monitor, str):
            raise ValueError(f'`best` must be a name in the logs, such as "val_loss", or None. Received: {monitor!r}.')
        check_choice(mode, "mode", ("auto", "min", "max"))
        if mode == "auto":
            mode = "min" if any(part in (monitor or "") for part in _SMALLER_IS_BETTER) else "max"
        self.monitor, self.mode = monitor, mode
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self.entry: dict | None = None  # JSON-ready: the best value so far, and batches trained on by then
        self._has_warned = False

    def restore(self, entry: dict | None) -> None:
        """Takes the best value of a checkpoint, if it is one of the same metric."""
        if entry is not None and (entry["monitor"], entry["mode"]) == (self.monitor, self.mode):
            self.entry = entry

    def is_improved_by(self, logs: Mapping[str, float] | None, step: int) -> bool:
        """Whether an epoch is the best so far, which it then is.

        Args:
            logs: the logs at the end of the epoch.
            step: batches trained on by then.
        """
        if self.monitor is None:
            return False
        value = (logs or {}).get(self.monitor)
        if value is None:
            if not self._has_warned:
                warn_caller(
                    f"`best={self.monitor!r}` is not in the logs of this epoch, so that no checkpoint is the best one. "
                    f"They have {sorted(logs or {})}."
                )
            self._has_warned = True
            return False
        value = float(value)
        sign = 1 if self.mode == "max" else -1
        if math.isnan(value) or (self.entry is not None and sign * value <= sign * self.entry["value"]):
            return False
        self.entry = {"monitor": self.monitor, "mode": self.mode, "value": value, "step": step}
        return True


def best_entry(path: Path) -> dict:
    """The best epoch of a run, as its newest checkpoint records it.

    Args:
        path: that checkpoint, or a part of it.

    Returns:
        A dict of `monitor`, `mode`, `value` and `step`, the batches trained on by then.

    Raises:
        CheckpointError: if it records none.
    """
    entry = step_folder.read_state(path).get("best")
    if entry is None:
        raise CheckpointError(f'{path} records no best epoch. Train with `TrainingCheckpoint(..., best="val_loss")`.')
    return entry
