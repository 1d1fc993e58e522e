"""Files that appear, or are replaced, when they are complete."""

import os
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a draft beside the file first, so that a failed write leaves no partial file under the name.

    Args:
        path: the file's path, in a folder that exists.
        content: the whole content; text is written as UTF-8, with its line ends as they are.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
