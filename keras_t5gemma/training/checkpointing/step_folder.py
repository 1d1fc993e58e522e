"""A training checkpoint on disk: one folder per step, complete or absent, each file with its checksum."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import xxhash
from safetensors.numpy import save_file

from keras_t5gemma.checkpoints.atomic_folder import check_space, new_folder
from keras_t5gemma.checkpoints.hugging_face.export import write_checkpoint
from keras_t5gemma.checkpoints.hugging_face.reader import read_json
from keras_t5gemma.checkpoints.hugging_face.writer import write_json
from keras_t5gemma.checkpoints.tensor_source import CHUNK_BYTES, CheckpointError

# In each step's folder: what is no array; arrays; and a T5Gemma's weights as a Hugging Face folder.
STATE_FILE, ARRAYS_FILE, MODEL_FOLDER = "training.json", "training.safetensors", "model"
_STEP = re.compile(r"step_(\d{8,})")
# Hidden: what a killed run left half written (`new_folder` names it so), or half removed.
_LEFTOVER = re.compile(r"\.step_\d{8,}\.(partial|removed)")


def steps_in(folder):
    """The checkpoints in a folder, as paths, oldest first."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path):
    """The number in a checkpoint's name."""
    return int(_STEP.fullmatch(Path(path).name)[1])


def step_name(step):
    """The name of the checkpoint after so many batches."""
    return f"step_{step:08d}"


def prepare(folder):
    """Makes the folder, removes what a killed run left half done, and tries whether files can be written.

    Raises:
        CheckpointError: where they cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"`folder`: no checkpoints can be written to {folder}: {error.strerror or error}. Choose a folder that can "
            f"be written to."
        ) from error


def write_step(folder, step, content, arrays, model=None):
    """Writes one checkpoint, which appears when it is complete and on the disk.

    Args:
        folder: of all checkpoints.
        step: the number of batches trained on.
        content: what is no array, JSON-ready.
        arrays: numpy arrays by name.
        model: the arguments of `write_checkpoint` after the folder, or None.

    Returns:
        The path of the new folder.

    Raises:
        CheckpointError: where the disk has no room.
    """
    target = Path(folder) / step_name(step)
    if target.exists():
        # Of a run that was set back by hand to an older checkpoint.
        _remove(target)
    with new_folder(target) as partial:
        check_space(partial, sum(array.nbytes for array in arrays.values()))
        save_file(arrays, partial / ARRAYS_FILE)
        if model is not None:
            write_checkpoint(partial / MODEL_FOLDER, **model, allow_non_finite=True)
        files = sorted(path for path in partial.rglob("*") if path.is_file() and not path.name.startswith("."))
        content = content | {"files": {str(path.relative_to(partial)): _file_checksum(path) for path in files}}
        write_json(partial / STATE_FILE, {"checkpoint": content, "xxh3_64": _text_checksum(content)})
        for path in (*files, partial / STATE_FILE, *{path.parent for path in files}, partial):
            _flush(path)
    _flush(target.parent)
    return target


def prune(folder, keep):
    """Removes all but the newest `keep` checkpoints."""
    for path in steps_in(folder)[:-keep]:
        _remove(path)


def verified(path):
    """What is no array of a checkpoint, once every file has been found as it was written.

    Raises:
        CheckpointError: the message names the damaged file.
    """
    content = read_state(path)
    for name, expected in content["files"].items():
        try:
            found = _file_checksum(Path(path) / name)
        except OSError as error:
            raise CheckpointError(f"{Path(path) / name} cannot be read: {error.strerror or error}.") from error
        if found != expected:
            raise CheckpointError(f"{Path(path) / name} is damaged: its checksum is {found}, and was {expected}.")
    return content


def read_state(path):
    """What is no array of a checkpoint, as it was written; its other files are not looked at.

    Raises:
        CheckpointError: where it is damaged.
    """
    file = Path(path) / STATE_FILE
    value = read_json(file)
    content = value.get("checkpoint")
    if not isinstance(content, dict) or value.get("xxh3_64") != _text_checksum(content):
        raise CheckpointError(f"{file} is damaged: its checksum is not that of its contents.")
    return content


def newest(folder):
    """The newest checkpoint of a folder, checked: its path and what is no array; None where there is none.

    Raises:
        CheckpointError: where it is damaged. None other is taken in silence: the message names one that is good.
    """
    steps = steps_in(folder)
    if not steps:
        return None
    try:
        return steps[-1], verified(steps[-1])
    except CheckpointError as error:
        good = next((path for path in reversed(steps[:-1]) if _is_good(path)), None)
        remedy = (
            f"{good} is good: remove {steps[-1]} to go on from there."
            if good
            else f"No older checkpoint in {folder} is good: choose another `folder` to begin anew."
        )
        raise CheckpointError(f"{error} {remedy}") from error


def _is_good(path):
    try:
        verified(path)
    except CheckpointError:
        return False
    return True


def _remove(path):
    # Renamed first: a run that is killed here leaves nothing that looks like a checkpoint.
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _file_checksum(path):
    found = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            found.update(piece)
    return found.hexdigest()


def _text_checksum(content):
    return xxhash.xxh3_64(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path):
    """Has the system write a file, or a folder's list of names, to the disk: a machine may die, not only a process."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
