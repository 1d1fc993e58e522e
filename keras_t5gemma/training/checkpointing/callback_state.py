"""The state of Keras's callbacks: saved with a run, and restored when the run resumes."""

from collections.abc import Sequence

import keras
import numpy as np

from keras_t5gemma._keras_internals import callbacks_of_the_same_fit
from keras_t5gemma.checkpoints.tensor_source import DTYPES
from keras_t5gemma.training.checkpointing.shards import SavedArrays

# Attributes for which Keras has no public interface. It resets those of the first two classes when training begins.
_STATES = {
    keras.callbacks.EarlyStopping: ("wait", "stopped_epoch", "best", "best_epoch"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "best", "cooldown_counter"),
    keras.callbacks.ModelCheckpoint: ("best",),
    # Whether averages and weights are swapped.
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
}
_BEST_WEIGHTS = "best_weights"


def stateful_callbacks(checkpoint: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    """The callbacks of a `fit` that have a state: those that watch a metric, and `SwapEMAWeights`.

    Args:
        checkpoint: a callback, while Keras calls its `set_params`.

    Returns:
        A list of them, in their order.

    Raises:
        ValueError: if a callback with a state comes after `checkpoint`, which would save before that one acts; or if
            there is a `BackupAndRestore`.
    """
    callbacks = callbacks_of_the_same_fit(checkpoint)
    if any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in callbacks):
        raise ValueError(
            "`callbacks` must not have BackupAndRestore beside TrainingCheckpoint: each would put its own weights into "
            "the model and begin with its own epoch. Leave one of them out."
        )
    later = [callback for callback in callbacks[callbacks.index(checkpoint) :] if _names(callback)]
    if later:
        name = type(later[0]).__name__
        raise ValueError(
            f"`callbacks` must have TrainingCheckpoint after {name}: it saves what {name} decides at the end of an "
            f"epoch. Received: {_class_names(callbacks)}."
        )
    return [callback for callback in callbacks if _names(callback)]


def progress_bar(checkpoint: keras.callbacks.Callback) -> keras.callbacks.ProgbarLogger | None:
    """Keras's progress bar of a `fit`, whose `target` is the number of batches of the epoch that begins next.

    Args:
        checkpoint: a callback, while Keras calls its `set_params`.

    Returns:
        None if there is no bar, or if it comes before `checkpoint` and so has begun an epoch already. Keras puts its
        own bar last.
    """
    callbacks = callbacks_of_the_same_fit(checkpoint)
    later = callbacks[callbacks.index(checkpoint) :]
    return next((callback for callback in later if isinstance(callback, keras.callbacks.ProgbarLogger)), None)


def states(
    callbacks: Sequence[keras.callbacks.Callback], earlier: tuple[list[dict], dict] | None = None
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The current states of callbacks.

    Args:
        callbacks: the result of `stateful_callbacks`.
        earlier: an earlier result of this function, for the states that do not describe the current weights; or None.

    Returns:
        `(entries, arrays)`: one entry per callback, JSON-ready; and the best weights that callbacks keep, by name.
    """
    entries, arrays = [], {}
    for index, callback in enumerate(callbacks):
        values = {name: getattr(callback, name) for name in _names(callback)}
        if values.get("best") is not None:
            values["best"] = float(values["best"])
        entries.append({**_key(callback), "state": values})
        # Keras creates new arrays each time and does not change them, so they are not copied.
        for position, array in enumerate(getattr(callback, "best_weights", None) or []):
            arrays[f"{_BEST_WEIGHTS}/{index:03d}/{position:06d}"] = array
    if earlier is not None:
        current, (entries, arrays) = entries, earlier
        entries = [
            new if isinstance(callback, keras.callbacks.SwapEMAWeights) else old
            for callback, new, old in zip(callbacks, current, entries, strict=True)
        ]
    return entries, arrays


def restore(
    callbacks: Sequence[keras.callbacks.Callback],
    entries: list[dict],
    saved: SavedArrays,
    reset_early_stopping: bool = False,
) -> None:
    """Restores the states of callbacks; a callback that the saved run did not have starts afresh.

    Args:
        callbacks: the result of `stateful_callbacks`.
        entries: those of `states` in the saved run.
        saved: the `SavedArrays` of its checkpoint.
        reset_early_stopping: whether early stopping counts epochs without improvement from 0 again.
    """
    remaining = list(enumerate(entries))
    for callback in callbacks:
        match = next((item for item in remaining if item[1].items() >= _key(callback).items()), None)
        if match is None:
            continue
        remaining.remove(match)
        index, entry = match
        for name, value in entry["state"].items():
            setattr(callback, name, value)
        if not isinstance(callback, keras.callbacks.EarlyStopping):
            continue
        if reset_early_stopping:
            callback.wait = callback.stopped_epoch = 0
        names = [name for name in saved.names((_BEST_WEIGHTS,)) if name.split("/")[1] == f"{index:03d}"]
        if names and callback.restore_best_weights:
            callback.best_weights = [_read(saved, name) for name in names]


def ended_by(callbacks: Sequence[keras.callbacks.Callback], epoch: int) -> dict | None:
    """The `EarlyStopping` that ended a run with this epoch, JSON-ready; None if there is no such callback."""
    for callback in callbacks:
        # 0 means "not stopped": `EarlyStopping` never stops with the first epoch.
        if isinstance(callback, keras.callbacks.EarlyStopping) and callback.stopped_epoch == epoch > 0:
            return {**_key(callback), "epochs": epoch + 1}
    return None


def _class_names(callbacks: Sequence[keras.callbacks.Callback]) -> list[str]:
    """Names of the callbacks' classes, without those that `fit` adds by itself."""
    names = [type(callback).__name__ for callback in callbacks]
    return [name for name in names if name not in ("History", "ProgbarLogger", "StreamCallback")]


def _key(callback: keras.callbacks.Callback) -> dict:
    """The items by which a saved state is matched with a callback."""
    return {"class": type(callback).__name__, "monitor": getattr(callback, "monitor", None)}


def _names(callback: keras.callbacks.Callback) -> tuple[str, ...]:
    """The attributes that are a callback's state; empty if it has no state."""
    return next((names for kind, names in _STATES.items() if isinstance(callback, kind)), ())


def _read(saved: SavedArrays, name: str) -> np.ndarray:
    """A saved array; bfloat16 as float32."""
    array = saved.read(name)
    # Not every backend accepts numpy's bfloat16.
    return array.astype("float32") if array.dtype == DTYPES["BF16"] else array
