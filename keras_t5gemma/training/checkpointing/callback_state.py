"""The state of Keras's callbacks: saved with a run, and given back when the run resumes."""

import keras

from keras_t5gemma._keras_internals import callbacks_of_the_same_fit
from keras_t5gemma.checkpoints.tensor_source import DTYPES

# Keras has no public way to these, and resets those of the first two when training begins.
_STATES = {
    keras.callbacks.EarlyStopping: ("wait", "stopped_epoch", "best", "best_epoch"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "best", "cooldown_counter"),
    keras.callbacks.ModelCheckpoint: ("best",),
    # Whether averages and weights have changed places.
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
}
_BEST_WEIGHTS = "best_weights"


def watching(checkpoint):
    """The callbacks of a `fit` that have a state: those that watch a metric, and `SwapEMAWeights`.

    Args:
        checkpoint: a callback, while Keras calls its `set_params`.

    Returns:
        A list of them, in their order.

    Raises:
        ValueError: if one comes after `checkpoint`, which then would save what that one is still to change; or if there
            is a `BackupAndRestore`.
    """
    everyone = callbacks_of_the_same_fit(checkpoint)
    if any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in everyone):
        raise ValueError(
            "`callbacks` must not have BackupAndRestore beside TrainingCheckpoint: each would put its own weights into "
            "the model and begin with its own epoch. Leave one of them out."
        )
    later = [callback for callback in everyone[everyone.index(checkpoint) :] if _names(callback)]
    if later:
        name = type(later[0]).__name__
        raise ValueError(
            f"`callbacks` must have TrainingCheckpoint after {name}: it saves what {name} decides at the end of an "
            f"epoch. Received: {_given(everyone)}."
        )
    return [callback for callback in everyone if _names(callback)]


def states(callbacks, earlier=None):
    """What callbacks know now.

    Args:
        callbacks: what `watching` gave.
        earlier: what this gave before, for all that is not about the weights as they are now; or None.

    Returns:
        `(described, arrays)`: JSON-ready, and the best weights that callbacks keep, by name.
    """
    described, arrays = [], {}
    for index, callback in enumerate(callbacks):
        values = {name: getattr(callback, name) for name in _names(callback)}
        if values.get("best") is not None:
            values["best"] = float(values["best"])
        described.append({**_key(callback), "state": values})
        # New arrays each time, which nobody changes: they need no copies.
        for place, array in enumerate(getattr(callback, "best_weights", None) or []):
            arrays[f"{_BEST_WEIGHTS}/{index:03d}/{place:06d}"] = array
    if earlier is not None:
        now, (described, arrays) = described, earlier
        described = [
            new if isinstance(callback, keras.callbacks.SwapEMAWeights) else old
            for callback, new, old in zip(callbacks, now, described, strict=True)
        ]
    return described, arrays


def restore(callbacks, described, saved, anew=False):
    """Gives callbacks what `states` found; those that were not there begin anew.

    Args:
        callbacks: what `watching` gave.
        described: of the run that goes on.
        saved: the `SavedArrays` of its checkpoint.
        anew: whether early stopping counts epochs without improvement anew.
    """
    left = list(enumerate(described))
    for callback in callbacks:
        same = next((entry for entry in left if entry[1].items() >= _key(callback).items()), None)
        if same is None:
            continue
        left.remove(same)
        index, entry = same
        for name, value in entry["state"].items():
            setattr(callback, name, value)
        if not isinstance(callback, keras.callbacks.EarlyStopping):
            continue
        if anew:
            callback.wait = callback.stopped_epoch = 0
        names = [name for name in saved.names((_BEST_WEIGHTS,)) if name.split("/")[1] == f"{index:03d}"]
        if names and callback.restore_best_weights:
            callback.best_weights = [_read(saved, name) for name in names]


def ended_by(callbacks, epoch):
    """What ended a run with this epoch, if it was early stopping: JSON-ready, or None."""
    for callback in callbacks:
        # 0 stands for not yet: it never stops with the first epoch.
        if isinstance(callback, keras.callbacks.EarlyStopping) and callback.stopped_epoch == epoch > 0:
            return {**_key(callback), "epochs": epoch + 1}
    return None


def _given(callbacks):
    """Names of classes, without those that `fit` adds by itself."""
    names = [type(callback).__name__ for callback in callbacks]
    return [name for name in names if not name.startswith("_") and name not in ("History", "ProgbarLogger")]


def _key(callback):
    return {"class": type(callback).__name__, "monitor": getattr(callback, "monitor", None)}


def _names(callback):
    """The attributes that are a callback's state; empty for one that has none."""
    return next((names for kind, names in _STATES.items() if isinstance(callback, kind)), ())


def _read(saved, name):
    array = saved.read(name)
    # As for weights: not every backend takes numpy's bfloat16.
    return array.astype("float32") if array.dtype == DTYPES["BF16"] else array
