"""The weights in a run's checkpoints: as folders to average and load, and loaded into a model."""

from pathlib import Path

import keras

from keras_t5gemma.checkpoints.processes import on_all_processes
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.training.checkpointing import model_state, process_folders, step_folder
from keras_t5gemma.training.checkpointing.best_epoch import best_entry


def training_weights(folder: str | Path, last: int | None = None, *, best: bool = False) -> list[Path]:
    """The folders of weights in a run's checkpoints, for `average_checkpoints` and `from_preset`.

    >>> average_checkpoints(training_weights("run", last=5), "averaged")

    Args:
        folder: the folder of a `TrainingCheckpoint`, of a T5Gemma without LoRA and quantization. For a run of several
            processes it must hold the folders of all; this function is called in one process, which writes the
            assembled weights into the first process's folder.
        last: the number of checkpoints, the newest; all if None.
        best: whether to take the checkpoint of the best epoch only; see `best` of `TrainingCheckpoint`.

    Returns:
        A list of paths of Hugging Face folders, oldest first.

    Raises:
        CheckpointError: if there are fewer checkpoints, no epoch is known to be the best, a checkpoint does not hold
            such weights, or a part is missing or damaged.
        ValueError: if `last` and `best` are both passed.
    """
    if best and last is not None:
        raise ValueError(f"`last` must be None beside best=True, which is one checkpoint. Received: last={last}.")
    steps = process_folders.readable_steps(folder)
    if not steps or len(steps) < (last or 0):
        raise CheckpointError(f"{folder} holds {len(steps)} training checkpoint(s). Expected {last or 'at least one'}.")
    if best:
        number = best_entry(steps[-1])["step"]
        steps = [path for path in steps if step_folder.step_of(path) == number]
        if not steps:
            raise CheckpointError(
                f"{folder} does not hold {step_folder.step_name(number)} any more, its best checkpoint."
            )
    return [_model_folder(path) for path in (steps[-last:] if last else steps)]


def best_of_run(folder: str | Path) -> dict:
    """The best epoch of a run, see `best_entry`.

    Args:
        folder: the folder of a `TrainingCheckpoint`.

    Raises:
        CheckpointError: if there is no checkpoint, or no epoch is known to be the best.
    """
    steps = process_folders.restorable_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder} holds no training checkpoint.")
    return best_entry(steps[max(steps)])


def _model_folder(path: Path) -> Path:
    """The Hugging Face folder in a checkpoint; it is assembled first if the checkpoint is in parts."""
    model = path / step_folder.MODEL_FOLDER
    if not model.is_dir() and process_folders.part_of(path) is not None:
        content = step_folder.verified(path)
        if content["t5gemma"] is not None:
            model_state.write_model(path, content)
    if not model.is_dir():
        raise CheckpointError(
            f"{path} does not hold the weights of a plain T5Gemma, but e.g. of one with LoRA. Fill a model with "
            f"`load_training_weights`, and export that."
        )
    return model


def load_training_weights(
    model: keras.Model,
    folder: str | Path,
    step: int | None = None,
    *,
    last: int | None = None,
    best: bool = False,
) -> None:
    """Loads the weights of a training checkpoint into a model, LoRA's included; e.g. to export the model.

    >>> lm.backbone.enable_lora(8)
    >>> load_training_weights(lm, "run")
    >>> lm.save_to_preset("answer")

    Under a `keras.distribution`, the shards of each variable are read one by one. The checkpoints of several processes
    fill a model of any layout and number of processes, if all their folders are there; all processes call this.

    Args:
        model: a model like the trained one.
        folder: the folder of a `TrainingCheckpoint`.
        step: the batches trained on; the newest checkpoint if None.
        last: if set, load the mean of this many checkpoints up to that one, summed in float64.
        best: whether to load the checkpoint of the best epoch; see `best` of `TrainingCheckpoint`.

    Raises:
        CheckpointError: if there are fewer checkpoints than requested, no epoch is known to be the best, or one is
            damaged or of another model.
        ValueError: if `best` comes with `step` or `last`.
    """
    if best and (step is not None or last is not None):
        raise ValueError(f"`best` must be False beside `step` and `last`. Received: step={step}, last={last}.")
    steps = process_folders.restorable_steps(folder)
    if best and steps:
        step = on_all_processes(lambda: best_entry(steps[max(steps)])["step"])
    chosen = [number for number in steps if step is None or number <= step][-(last or 1) :]
    if len(chosen) < (last or 1) or (step is not None and step not in steps):
        raise CheckpointError(
            f"{folder} holds training checkpoints of steps {list(steps)}. Received: step={step}"
            f"{'' if last is None else f', last={last}'}."
        )
    checkpoints = on_all_processes(lambda: [(steps[number], step_folder.verified(steps[number])) for number in chosen])
    on_all_processes(lambda: model_state.restore_weights(model, checkpoints))
