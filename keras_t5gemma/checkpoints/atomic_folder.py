"""A folder that appears under its name only when it is complete."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from keras_t5gemma.checkpoints.tensor_source import CheckpointError

_LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Creates a folder that appears under its name only when the block ends without an error.

    The block fills a hidden sibling of the target, which is renamed at the end, and removed if anything is raised. The
    remains of a killed run are removed by the next run. A target that exists is refused, never replaced, so that nobody
    loses files.

    Args:
        folder: the path to create; its parents are created too.

    Yields:
        The `pathlib.Path` to write into.

    Raises:
        CheckpointError: if the target exists, another process is writing it, or the disk is full.
    """
    target = Path(folder)
    _check_absent(target, "exists already. Choose another folder, or remove it first")
    partial = target.parent / f".{target.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    # The lock ends with the process, however that ends. So a partial folder that can be locked has no owner.
    lock = FileLock(partial / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{target} is being written by another process.") from error
    try:
        for path in partial.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield partial
        _check_absent(target, "was created by somebody else in the meantime")
        partial.rename(target)
        (target / _LOCK).unlink(missing_ok=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise CheckpointError(
                f"{target} could not be written: {error.strerror}. Nothing of it was kept; free some space, or choose "
                f"a folder on another disk."
            ) from error
        raise
    finally:
        lock.release()


def check_space(folder: str | os.PathLike[str], nbytes: int) -> None:
    """Checks, before anything is written, that the disk has room for a checkpoint.

    Args:
        folder: an existing folder on the disk.
        nbytes: the size of the checkpoint in bytes.

    Raises:
        CheckpointError: if the disk has less free space.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"{Path(folder).parent} has {free / 1e9:.2f} GB free and the checkpoint takes {nbytes / 1e9:.2f} GB. Free "
            f"some space, or choose a folder on another disk."
        )


def _check_absent(target: Path, reason: str) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target} {reason}.")
