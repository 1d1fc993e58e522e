"""The folders of a run of several processes: one per process, each with that process's checkpoints.

    run/process_0_of_2/step_00000500/    the shards of the first process, and its own state
    run/process_1_of_2/step_00000500/    those of the second

A checkpoint is complete if each process has its part. A process does not see the others while it writes, so all of them
agree twice: before a save, that all have written the previous checkpoint, which the new parts record; and when they
resume, from which checkpoint.
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from keras_t5gemma.checkpoints.processes import gather, on_all_processes, process_count, process_index
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.training.checkpointing import step_folder

_PART = re.compile(r"process_(\d+)_of_(\d+)")


def part_folder(folder: str | Path, index: int, count: int) -> Path:
    """The folder of a process's checkpoints; the run's folder itself if there is one process.

    Args:
        folder: the run's folder.
        index: the process's index, from 0.
        count: the number of processes.
    """
    return Path(folder) if count == 1 else Path(folder) / f"process_{index}_of_{count}"


def part_of(path: str | Path) -> tuple[int, int] | None:
    """`(index, count)` of the process that wrote a part of a checkpoint; None if the path is not that of a part."""
    match = _PART.fullmatch(Path(path).parent.name)
    return None if match is None else (int(match[1]), int(match[2]))


def parts_of(path: Path) -> dict[int, Path]:
    """The parts of a checkpoint that this process can see, by index, from the path of one of them."""
    _, count = part_of(path)
    parts = {index: part_folder(path.parent.parent, index, count) / path.name for index in range(count)}
    return {index: part for index, part in parts.items() if part.is_dir()}


def begin(folder: str | Path) -> tuple[Path, tuple[Path, dict] | None]:
    """Prepares this process's folder and finds the checkpoint from which all processes resume.

    Args:
        folder: the run's folder, the same on all processes.

    Returns:
        `(own_folder, checkpoint)`: the folder of this process's checkpoints; and the checkpoint's path and metadata, or
        None if there is no checkpoint.

    Raises:
        CheckpointError: if the folder cannot be written to or is of another number of processes, or if a part of the
            checkpoint is missing or damaged.
    """
    count = process_count()
    own_folder = part_folder(folder, process_index(), count)
    on_all_processes(lambda: _check_count(folder, count))
    on_all_processes(lambda: step_folder.prepare(own_folder))
    if count == 1:
        return own_folder, step_folder.newest(own_folder)
    return own_folder, agree_on_checkpoint(folder, own_folder)


def agree_on_checkpoint(folder: str | Path, own_folder: Path) -> tuple[Path, dict] | None:
    """Agrees on the newest checkpoint of which every process has its part.

    A process may have been killed before it wrote its part of a newer one. Parts of newer checkpoints are removed: the
    run writes them again.

    Args:
        folder: the run's folder.
        own_folder: the folder of this process's parts.

    Returns:
        The path and metadata of this process's part; or None if there is no such checkpoint.

    Raises:
        CheckpointError: on all processes, if a part is damaged, or a part that had been written is missing.
    """
    numbers = _numbers(own_folder)
    step = max(_common(numbers), default=0)
    by_process = gather(np.array([_agreed(folder), max(numbers, default=0)], "int32"))
    if (agreed := int(by_process[:, 0].max())) > step:
        raise CheckpointError(
            f"{folder}: all {process_count()} processes had written {step_folder.step_name(agreed)}, and not all of "
            f"them find their part of it now: the newest they find is {by_process[:, 1].tolist()}, by process, 0 for "
            f"none. Put the missing folders back (each process needs its own, "
            f"process_<index>_of_{process_count()}), or choose another `folder` to begin anew."
        )
    content = None if step == 0 else on_all_processes(lambda: _verified(own_folder / step_folder.step_name(step)))
    for path in step_folder.steps_in(own_folder):
        if step_folder.step_of(path) > step:
            shutil.rmtree(path)
    return None if content is None else (own_folder / step_folder.step_name(step), content)


def restorable_steps(folder: str | Path) -> dict[int, Path]:
    """The checkpoints whose weights all processes can restore; all of them call this.

    Args:
        folder: the folder of a run of any number of processes.

    Returns:
        A dict from batches trained on, in order, to the path of a checkpoint or of a part of it: this process's own
        part, if as many processes wrote it as run now, else a part that this process can see.
    """
    count, visible = on_all_processes(lambda: _visible_parts(folder))
    own_folder = part_folder(folder, process_index(), count)
    if process_count() != count or own_folder not in visible:
        own_folder = next(iter(visible), None)
    numbers = set.intersection(*map(_numbers, visible)) if visible else set()
    return {number: own_folder / step_folder.step_name(number) for number in sorted(_common(numbers))}


def readable_steps(folder: str | Path) -> list[Path]:
    """The checkpoints of which this process can read all parts.

    Args:
        folder: the folder of a run of any number of processes.

    Returns:
        A list of the paths of checkpoints, or of the first process's parts of them, oldest first.

    Raises:
        CheckpointError: if the folder of a process is missing.
    """
    count, visible = _visible_parts(folder)
    if visible and len(visible) < count:
        raise CheckpointError(
            f"{folder} holds checkpoints of {count} processes, and of their folders only "
            f"{', '.join(part.name for part in visible)}. Copy the others beside them."
        )
    numbers = set.intersection(*map(_numbers, visible)) if visible else set()
    return [visible[0] / step_folder.step_name(number) for number in sorted(numbers)]


def _verified(path: Path) -> dict:
    """`step_folder.verified`, with an error that says how to resume from an earlier checkpoint."""
    try:
        return step_folder.verified(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Remove {path.name}, and newer ones, from the folder of every process to resume from the "
            f"checkpoint before it."
        ) from error


def _counts(folder: str | Path) -> set[int]:
    """The numbers of processes whose checkpoints a folder holds."""
    folder = Path(folder)
    matches = [_PART.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    counts = {int(match[2]) for match in matches if match and step_folder.steps_in(folder / match[0])}
    return counts | ({1} if step_folder.steps_in(folder) else set())


def _check_count(folder: str | Path, count: int) -> None:
    """Raises a CheckpointError if a folder holds checkpoints of another number of processes."""
    if others := sorted(_counts(folder) - {count}):
        raise CheckpointError(
            f"{folder} holds checkpoints of {others[0]} process(es), and this is one of {count}. Each process reads a "
            f"share of the data, so a run resumes with as many processes only. Start {others[0]}, or choose another "
            f"`folder` to begin anew; `load_training_weights` fills a model with the weights, whatever its processes."
        )


def _visible_parts(folder: str | Path) -> tuple[int, list[Path]]:
    """The number of processes that wrote a run, and those of their folders that this process can see."""
    counts = sorted(_counts(folder))
    if len(counts) > 1:
        raise CheckpointError(f"{folder} holds runs of {counts} processes. Leave the folders of one.")
    count = counts[0] if counts else 1
    return count, [part for part in (part_folder(folder, index, count) for index in range(count)) if part.is_dir()]


def _numbers(folder: Path) -> set[int]:
    """The numbers of batches at which a folder has checkpoints."""
    return {step_folder.step_of(path) for path in step_folder.steps_in(folder)}


def _common(numbers: Iterable[int]) -> set[int]:
    """The intersection of the processes' sets of numbers, which are positive."""
    numbers = sorted(numbers)
    most = int(gather(np.array(len(numbers), "int32")).max())
    rows = gather(np.array([*numbers, *[0] * (most - len(numbers))], "int32"))
    return set.intersection(*(set(row.tolist()) for row in rows)) - {0}


def _agreed(folder: str | Path) -> int:
    """The newest checkpoint that all processes had written, as the visible parts record it; 0 if there is none."""
    numbers = [0]
    for part in Path(folder).iterdir():
        match = _PART.fullmatch(part.name)
        for path in step_folder.steps_in(part) if match and int(match[2]) == process_count() else ():
            try:
                numbers.append(step_folder.read_state(path)["agreed"])
            except CheckpointError:
                continue  # damage matters only if the run resumes from this part, which is checked then
    return max(numbers)
