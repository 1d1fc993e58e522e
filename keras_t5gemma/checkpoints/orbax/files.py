"""Opens a folder in Orbax's format: one tensorstore per parameter, of which shapes and dtypes are read.

The format (https://orbax.readthedocs.io): the JSON file `_METADATA` lists the keys that lead to each parameter. Each
parameter is a zarr array, whose name is its keys joined by dots. All arrays are in one OCDBT database, or each is in a
folder of its own. The arrays are read by tensorstore, as within Orbax. Orbax itself is not called: it would start JAX,
which then takes most of an accelerator's memory even if Keras runs on another backend.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from keras_t5gemma.checkpoints.hugging_face.reader import read_json
from keras_t5gemma.checkpoints.tensor_source import CheckpointError

if TYPE_CHECKING:
    import tensorstore

METADATA_FILE = "_METADATA"
DATABASE_FILE = "manifest.ocdbt"


def is_orbax(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a checkpoint in Orbax's format, or is the parent of one."""
    return bool(_checkpoints(Path(folder)))


def open_orbax(folder: str | os.PathLike[str], pattern: str) -> tuple[Path, dict[str, tensorstore.TensorStore]]:
    """Opens the parameters of a checkpoint in Orbax's format.

    Args:
        folder: the checkpoint's folder or its parent: on Kaggle a tokenizer may lie beside the checkpoint's folder.
        pattern: a regular expression that the parameters' paths must match. Other paths are refused, so that a
            checkpoint cannot name files outside its folder.

    Returns:
        The checkpoint's own folder, and the parameters' tensorstores by path: keys joined by slashes.

    Raises:
        CheckpointError: if it is not a checkpoint of this kind, is damaged, or has a parameter of another name.
        ImportError: if tensorstore is not installed.
    """
    folder = _checkpoint_folder(Path(folder))
    metadata = read_json(folder / METADATA_FILE)
    names = _names_on_disk(folder, metadata)
    if unknown := [path for path in names if not re.fullmatch(pattern, path)]:
        raise CheckpointError(
            f"{folder} holds {len(unknown)} parameter(s) that no T5Gemma has, among them {unknown[0]!r}."
        )
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(
            "A checkpoint in Orbax's format needs Orbax: `pip install 'keras-t5gemma[orbax]'` installs it."
        ) from error
    # All are opened at once: an array's metadata is small, and the time goes into waiting for it.
    futures = {path: tensorstore.open(_spec(folder, metadata, name)) for path, name in names.items()}
    arrays = {path: result(future, f"{folder}: parameter {path!r}") for path, future in futures.items()}
    for path, array in arrays.items():
        chunk = cast("tuple[int, ...]", array.chunk_layout.read_chunk.shape)
        if any(size > length for size, length in zip(chunk, array.shape, strict=True)):
            # tensorstore allocates a whole chunk before it reads it. If memory is short, the process dies.
            raise CheckpointError(f"{folder}: parameter {path!r} of shape {array.shape} has chunks of shape {chunk}.")
    return folder, arrays


def result(future: tensorstore.Future, title: str) -> Any:
    """Waits for the result of a tensorstore's future.

    Raises:
        CheckpointError: if the operation failed; the message begins with the title.
    """
    try:
        return future.result()
    except Exception as error:  # tensorstore raises many types, by its own status.
        # The message without the request and the lines of C++ that follow in brackets.
        raise CheckpointError(f"{title} cannot be read: {str(error).partition(' [')[0]}.") from error


def _checkpoints(folder: Path) -> list[Path]:
    """The folder itself if it is a checkpoint, else the checkpoints among its subfolders."""
    if any((folder / name).is_file() for name in (METADATA_FILE, DATABASE_FILE)):
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{METADATA_FILE}"))


def _checkpoint_folder(folder: Path) -> Path:
    """The resolved path of the one checkpoint in a folder; raises a `CheckpointError` unless there is exactly one."""
    paths = _checkpoints(folder)
    if len(paths) != 1:
        names = f": {', '.join(path.name for path in paths)}. Name one of them" if paths else f", no {METADATA_FILE}"
        raise CheckpointError(f"{folder} holds {len(paths)} checkpoints in Orbax's format{names}.")
    return paths[0].resolve()


def _names_on_disk(folder: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The arrays' names by parameter path.

    Gemma's own loader (`gemma/gm/ckpts`) reads two trees, which give the same paths. One is that of the model. The
    other is flat: `transformer/` precedes every name, and an extra `w` follows the names of the feed-forward.

    Raises:
        CheckpointError: if the metadata are damaged, or two arrays have one path.
    """
    tree = metadata.get("tree_metadata")
    if not isinstance(tree, dict) or not tree:
        raise CheckpointError(f"{folder / METADATA_FILE} has no `tree_metadata` with the parameters' keys.")
    names = {}
    for title, entry in tree.items():
        try:
            keys = [str(part["key"]) for part in entry["key_metadata"]]
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{folder / METADATA_FILE}: the entry {title!r} has no keys.") from error
        path = "/".join(keys).removeprefix("transformer/")
        path = path.removesuffix("/w") if "/mlp/" in path else path
        if path in names:
            raise CheckpointError(f"{folder / METADATA_FILE}: parameter {path!r} comes twice.")
        names[path] = ".".join(keys)
    return names


def _spec(folder: Path, metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The JSON spec with which tensorstore opens one array."""
    store: dict[str, Any] = {"driver": "file", "path": f"{folder}/"}
    # Older versions of Orbax do not write `use_ocdbt`.
    if metadata.get("use_ocdbt", (folder / DATABASE_FILE).is_file()):
        store = {"driver": "ocdbt", "base": store, "path": f"{name}/"}
    else:
        store["path"] += f"{name}/"
    return {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        "kvstore": store,
        # If Orbax stored zeros like all other numbers, missing data are an error rather than zeros.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
        "open": True,
    }
