"""The weights in a run's checkpoints: as folders to average and load, and into a model."""

from keras_t5gemma.checkpoints.processes import on_all_processes
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.training.checkpointing import model_state as state
from keras_t5gemma.training.checkpointing import process_folders as parts
from keras_t5gemma.training.checkpointing import step_folder as files


def training_weights(folder, last=None):
    """The weights that a run's checkpoints hold, for `average_checkpoints` and `from_preset`.

    >>> average_checkpoints(training_weights("run", last=5), "averaged")

    Args:
        folder: of a `TrainingCheckpoint`, of a T5Gemma without LoRA and not quantized. Of a run of several processes it
            holds the folders of all; this is called in one process, and writes what it puts together into the first's.
        last: how many of the newest; all where None.

    Returns:
        A list of paths of Hugging Face folders, oldest first.

    Raises:
        CheckpointError: where there are fewer, one holds no such weights, or a part is missing or damaged.
    """
    steps = parts.readable_steps(folder)
    if not steps or len(steps) < (last or 0):
        raise CheckpointError(f"{folder} holds {len(steps)} training checkpoint(s). Expected {last or 'at least one'}.")
    return [_model_folder(path) for path in (steps[-last:] if last else steps)]


def _model_folder(path):
    """The Hugging Face folder in a checkpoint; put together first, where the checkpoint is in parts."""
    model = path / files.MODEL_FOLDER
    if not model.is_dir() and parts.part_of(path) is not None:
        content = files.verified(path)
        if content["t5gemma"] is not None:
            state.write_model(path, content)
    if not model.is_dir():
        raise CheckpointError(
            f"{path} holds the weights of no plain T5Gemma, but e.g. of one with LoRA. Fill a model with "
            f"`load_training_weights`, and export that."
        )
    return model


def load_training_weights(model, folder, step=None, *, last=None):
    """Fills a model with the weights of a training checkpoint, LoRA's included; to export it, say.

    >>> lm.backbone.enable_lora(8)
    >>> load_training_weights(lm, "run")
    >>> lm.save_to_preset("answer")

    Under a `keras.distribution`, each variable goes into its shards as they are read. A run of several processes fills
    a model of any layout and number of processes, where all their folders are there; all processes call this.

    Args:
        model: a model like the one trained.
        folder: of a `TrainingCheckpoint`.
        step: the batches trained on; the newest checkpoint where None.
        last: the mean of so many checkpoints up to that one instead, as float64 sums.

    Raises:
        CheckpointError: if there are fewer checkpoints than asked for, or one is damaged or of another model.
    """
    steps = parts.restorable_steps(folder)
    chosen = [number for number in steps if step is None or number <= step][-(last or 1) :]
    if len(chosen) < (last or 1) or (step is not None and step not in steps):
        raise CheckpointError(
            f"{folder} holds training checkpoints of steps {list(steps)}. Received: step={step}"
            f"{'' if last is None else f', last={last}'}."
        )
    checkpoints = on_all_processes(lambda: [(steps[number], files.verified(steps[number])) for number in chosen])
    on_all_processes(lambda: state.restore_weights(model, checkpoints))
