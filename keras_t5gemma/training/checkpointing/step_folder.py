"""A training checkpoint on disk: one folder per step, complete or absent, each file with its checksum."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import xxhash
from safetensors.numpy import save_file

from keras_t5gemma.checkpoints.atomic_folder import check_space, new_folder
from keras_t5gemma.checkpoints.hugging_face.export import write_checkpoint
from keras_t5gemma.checkpoints.hugging_face.reader import read_json
from keras_t5gemma.checkpoints.hugging_face.writer import write_json
from keras_t5gemma.checkpoints.tensor_source import CHUNK_BYTES, CheckpointError

# Files of a step folder: metadata (JSON), arrays (safetensors), and T5Gemma weights as a Hugging Face folder.
STATE_FILE, ARRAYS_FILE, MODEL_FOLDER = "training.json", "training.safetensors", "model"
_STEP = re.compile(r"step_(\d{8,})")
# Hidden folders that a killed run left incomplete (`new_folder` gives the name) or half removed.
_LEFTOVER = re.compile(r"\.step_\d{8,}\.(partial|removed)")


def steps_in(folder: str | Path) -> list[Path]:
    """The paths of the checkpoints in a folder, oldest first."""
    folder = Path(folder)
    paths = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(paths, key=step_of)


def step_of(path: str | Path) -> int:
    """The number of batches in a checkpoint's name."""
    return int(_STEP.fullmatch(Path(path).name)[1])


def step_name(step: int) -> str:
    """The name of the checkpoint after this number of batches."""
    return f"step_{step:08d}"


def prepare(folder: str | Path) -> None:
    """Creates the folder, removes incomplete folders of a killed run, and checks that files can be written.

    Raises:
        CheckpointError: if files cannot be written.
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


def write_step(
    folder: str | Path, step: int, content: dict, arrays: dict[str, np.ndarray], model: dict | None = None
) -> Path:
    """Writes one checkpoint, which appears when it is complete and on the disk.

    Args:
        folder: the folder of all checkpoints.
        step: the number of batches trained on.
        content: the metadata, JSON-ready.
        arrays: numpy arrays by name.
        model: the arguments of `write_checkpoint` after the folder, or None.

    Returns:
        The path of the new folder.

    Raises:
        CheckpointError: if the disk has no room.
    """
    target = Path(folder) / step_name(step)
    if target.exists():
        # It exists if the run was reset by hand to an older checkpoint.
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


def prune(folder: str | Path, keep: int, spared: int | None = None) -> None:
    """Removes all but the newest `keep` checkpoints and that of the step `spared`."""
    for path in steps_in(folder)[:-keep]:
        if step_of(path) != spared:
            _remove(path)


def verified(path: str | Path) -> dict:
    """The metadata of a checkpoint, after the checksums of all its files were checked.

    Raises:
        CheckpointError: if a file is damaged; the message names it.
    """
    content = read_state(path)
    for name, expected in content["files"].items():
        try:
            checksum = _file_checksum(Path(path) / name)
        except OSError as error:
            raise CheckpointError(f"{Path(path) / name} cannot be read: {error.strerror or error}.") from error
        if checksum != expected:
            raise CheckpointError(f"{Path(path) / name} is damaged: its checksum is {checksum}, and was {expected}.")
    return content


def read_state(path: str | Path) -> dict:
    """The metadata of a checkpoint; its other files are not checked.

    Raises:
        CheckpointError: if the metadata is damaged.
    """
    file = Path(path) / STATE_FILE
    value = read_json(file)
    content = value.get("checkpoint")
    if not isinstance(content, dict) or value.get("xxh3_64") != _text_checksum(content):
        raise CheckpointError(f"{file} is damaged: its checksum is not that of its contents.")
    return content


def newest(folder: str | Path) -> tuple[Path, dict] | None:
    """The newest checkpoint of a folder, checked: its path and metadata; None if there is no checkpoint.

    Raises:
        CheckpointError: if it is damaged. An older checkpoint is never used silently; the message names the newest good
            one.
    """
    steps = steps_in(folder)
    if not steps:
        return None
    try:
        return steps[-1], verified(steps[-1])
    except CheckpointError as error:
        good = next((path for path in reversed(steps[:-1]) if _is_good(path)), None)
        remedy = (
            f"{good} is good: remove {steps[-1]} to resume from there."
            if good
            else f"No older checkpoint in {folder} is good: choose another `folder` to begin anew."
        )
        raise CheckpointError(f"{error} {remedy}") from error


def _is_good(path: Path) -> bool:
    """Whether all files of a checkpoint have the right checksums."""
    try:
        verified(path)
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    """Removes a checkpoint's folder."""
    # Renamed first: a run that is killed here does not leave an incomplete folder with a checkpoint's name.
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _file_checksum(path: Path) -> str:
    """The xxh3_64 checksum of a file, in hexadecimal digits."""
    checksum = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            checksum.update(piece)
    return checksum.hexdigest()


def _text_checksum(content: dict) -> str:
    """The xxh3_64 checksum of metadata, in hexadecimal digits."""
    return xxhash.xxh3_64(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk, so that it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
