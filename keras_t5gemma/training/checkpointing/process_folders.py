"""The folders of a run of several processes: one per process, each with that process's checkpoints.

    run/process_0_of_2/step_00000500/    what the first process holds of every array, and its own state
    run/process_1_of_2/step_00000500/    what the second does

A checkpoint is whole when each process has its part. None knows of the others as it writes, so all agree: before a save
that all have written the one before it, which the parts then say; when they go on, from which one.
"""

import re
import shutil
from pathlib import Path

import numpy as np

from keras_t5gemma.checkpoints.processes import gather, on_all_processes, process_count, process_index
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.training.checkpointing import step_folder as files

_PART = re.compile(r"process_(\d+)_of_(\d+)")


def part_folder(folder, index, count):
    """Where a process has its part of a run: one process alone in the run's folder itself."""
    return Path(folder) if count == 1 else Path(folder) / f"process_{index}_of_{count}"


def part_of(path):
    """`(index, count)` of the process whose part of a checkpoint a path is, or None where it is no part."""
    match = _PART.fullmatch(Path(path).parent.name)
    return None if match is None else (int(match[1]), int(match[2]))


def parts_of(path):
    """The parts of a checkpoint, by index, as far as they can be seen from here; one part's path says where."""
    _, count = part_of(path)
    parts = {index: part_folder(path.parent.parent, index, count) / path.name for index in range(count)}
    return {index: part for index, part in parts.items() if part.is_dir()}


def begin(folder):
    """Prepares this process's folder and finds the checkpoint that all processes go on from.

    Args:
        folder: of the run, the same on all processes.

    Returns:
        `(own, found)`: the folder of this process's checkpoints; and the checkpoint's path and what is no array of it,
        or None where there is none.

    Raises:
        CheckpointError: where the folder cannot be written to or is of another number of processes, and where a part of
            the checkpoint is missing or damaged.
    """
    count = process_count()
    own = part_folder(folder, process_index(), count)
    on_all_processes(lambda: _check_count(folder, count))
    on_all_processes(lambda: files.prepare(own))
    if count == 1:
        return own, files.newest(own)
    return own, agree_on_checkpoint(folder, own)


def agree_on_checkpoint(folder, own):
    """Has all processes go on from the newest checkpoint of which each of them has its part.

    One may have been killed before it had written. Parts of newer checkpoints are removed: the run writes them again.

    Args:
        folder: of the run.
        own: of this process's parts.

    Returns:
        This process's part: its path and what is no array; or None where there is no such checkpoint.

    Raises:
        CheckpointError: on all processes, where a part is damaged, or one is missing that was there.
    """
    numbers = _numbers(own)
    step = max(_common(numbers), default=0)
    told = gather(np.array([_agreed(folder), max(numbers, default=0)], "int32"))
    if (agreed := int(told[:, 0].max())) > step:
        raise CheckpointError(
            f"{folder}: all {process_count()} processes had written {files.step_name(agreed)}, and not all of them "
            f"find their part of it now: the newest they find is {told[:, 1].tolist()}, by process, 0 for none. Put "
            f"the missing folders back (each process needs its own, process_<index>_of_{process_count()}), or choose "
            f"another `folder` to begin anew."
        )
    content = None if step == 0 else on_all_processes(lambda: _verified(own / files.step_name(step)))
    for path in files.steps_in(own):
        if files.step_of(path) > step:
            shutil.rmtree(path)
    return None if content is None else (own / files.step_name(step), content)


def restorable_steps(folder):
    """The checkpoints whose weights this process and all beside it can restore; all of them call this.

    Args:
        folder: of a run of any number of processes.

    Returns:
        A dict from batches trained on, in order, to the path of a checkpoint, or of a part of one: this process's own,
        where it is one of as many as wrote it, else of one that can be seen from here.
    """
    count, seen = on_all_processes(lambda: _seen(folder))
    own = part_folder(folder, process_index(), count)
    if process_count() != count or own not in seen:
        own = next(iter(seen), None)
    numbers = set.intersection(*map(_numbers, seen)) if seen else set()
    return {number: own / files.step_name(number) for number in sorted(_common(numbers))}


def readable_steps(folder):
    """The checkpoints that can be read from here as a whole, by this process alone.

    Args:
        folder: of a run of any number of processes.

    Returns:
        A list of the paths of checkpoints, or of the first process's part of them, oldest first.

    Raises:
        CheckpointError: where the folder of a process is missing.
    """
    count, seen = _seen(folder)
    if seen and len(seen) < count:
        raise CheckpointError(
            f"{folder} holds checkpoints of {count} processes, and of their folders only "
            f"{', '.join(part.name for part in seen)}. Copy the others beside them."
        )
    numbers = set.intersection(*map(_numbers, seen)) if seen else set()
    return [seen[0] / files.step_name(number) for number in sorted(numbers)]


def _verified(path):
    try:
        return files.verified(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Remove {path.name}, and what is newer, from the folder of every process to go on from the "
            f"checkpoint before it."
        ) from error


def _counts(folder):
    """The numbers of processes whose checkpoints a folder holds."""
    folder = Path(folder)
    matches = [_PART.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    counts = {int(match[2]) for match in matches if match and files.steps_in(folder / match[0])}
    return counts | ({1} if files.steps_in(folder) else set())


def _check_count(folder, count):
    if others := sorted(_counts(folder) - {count}):
        raise CheckpointError(
            f"{folder} holds checkpoints of {others[0]} process(es), and this is one of {count}. The data, of which "
            f"each process reads a share, go on with as many processes alone. Start {others[0]}, or choose another "
            f"`folder` to begin anew; `load_training_weights` fills a model with the weights, whatever its processes."
        )


def _seen(folder):
    """How many processes wrote a run, and those of their folders that can be seen from here."""
    counts = sorted(_counts(folder))
    if len(counts) > 1:
        raise CheckpointError(f"{folder} holds runs of {counts} processes. Leave the folders of one.")
    count = counts[0] if counts else 1
    return count, [part for part in (part_folder(folder, index, count) for index in range(count)) if part.is_dir()]


def _numbers(folder):
    return {files.step_of(path) for path in files.steps_in(folder)}


def _common(numbers):
    """What of a set of numbers of batches every process has in its own."""
    numbers = sorted(numbers)
    most = int(gather(np.array(len(numbers), "int32")).max())
    rows = gather(np.array([*numbers, *[0] * (most - len(numbers))], "int32"))
    return set.intersection(*(set(row.tolist()) for row in rows)) - {0}


def _agreed(folder):
    """The newest checkpoint that the parts which can be seen from here say all processes had written."""
    found = [0]
    for part in Path(folder).iterdir():
        match = _PART.fullmatch(part.name)
        for path in files.steps_in(part) if match and int(match[2]) == process_count() else ():
            try:
                found.append(files.read_state(path)["agreed"])
            except CheckpointError:
                continue  # whether it matters, whoever wants to go on from it will find
    return max(found)
