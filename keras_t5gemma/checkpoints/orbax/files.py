"""A folder in Orbax's format as tensorstores by parameter; only shapes and dtypes are read here.

The format (https://orbax.readthedocs.io): the JSON file `_METADATA` lists the keys that lead to each parameter; each is
a zarr array under its keys joined by dots, all of them in one OCDBT database or each in a folder of its own. The arrays
are read by tensorstore, as within Orbax. Orbax itself is not called: it would start JAX, which then takes most of an
accelerator's memory even where Keras runs on another backend.
"""

import re
from pathlib import Path

from keras_t5gemma.checkpoints.hugging_face.reader import read_json
from keras_t5gemma.checkpoints.tensor_source import CheckpointError

METADATA_FILE = "_METADATA"
DATABASE_FILE = "manifest.ocdbt"


def is_orbax(folder):
    """Whether a folder is, or directly holds, a checkpoint in Orbax's format."""
    return bool(_checkpoints(Path(folder)))


def open_orbax(folder, pattern):
    """The parameters of a checkpoint in Orbax's format.

    Args:
        folder: the checkpoint's, or the one above it: on Kaggle, a tokenizer may lie beside the checkpoint's folder.
        pattern: a regular expression for the parameters' paths. Nothing else is opened, so that no path of a
            checkpoint's own making leads out of its folder.

    Returns:
        The checkpoint's own folder, and `{path: tensorstore.TensorStore}`, the paths being keys joined by slashes.

    Raises:
        CheckpointError: where it is no such checkpoint, is damaged, or has a parameter of another name.
        ImportError: where tensorstore is not installed.
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
    # All at once: an array's description is small, and the time goes into waiting for it.
    futures = {path: tensorstore.open(_spec(folder, metadata, name)) for path, name in names.items()}
    arrays = {path: result(future, f"{folder}: parameter {path!r}") for path, future in futures.items()}
    for path, array in arrays.items():
        chunk = array.chunk_layout.read_chunk.shape
        if any(size > length for size, length in zip(chunk, array.shape, strict=True)):
            # Memory for a whole chunk is taken before it is read, and where there is not enough, the process dies.
            raise CheckpointError(f"{folder}: parameter {path!r} of shape {array.shape} has chunks of shape {chunk}.")
    return folder, arrays


def result(future, title):
    """What a tensorstore's future gives.

    Raises:
        CheckpointError: where it gives none; the message begins with the title.
    """
    try:
        return future.result()
    except Exception as error:  # Of whatever Python type is nearest to tensorstore's own status.
        # Its message, without the request and the lines of C++ that follow in brackets.
        raise CheckpointError(f"{title} cannot be read: {str(error).partition(' [')[0]}.") from error


def _checkpoints(folder):
    """The checkpoints that a folder is or, if it is none, directly holds."""
    if any((folder / name).is_file() for name in (METADATA_FILE, DATABASE_FILE)):
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{METADATA_FILE}"))


def _checkpoint_folder(folder):
    found = _checkpoints(folder)
    if len(found) != 1:
        names = f": {', '.join(path.name for path in found)}. Name one of them" if found else f", no {METADATA_FILE}"
        raise CheckpointError(f"{folder} holds {len(found)} checkpoints in Orbax's format{names}.")
    return found[0].resolve()


def _names_on_disk(folder, metadata):
    """The arrays' names by path. The two trees that Gemma's own loader (`gemma/gm/ckpts`) knows give the same paths.

    One tree is that of the model; the other is flat, with `transformer/` before every name and a `w` of its own after
    the feed-forward's.
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


def _spec(folder, metadata, name):
    """What tensorstore needs to open one array."""
    store = {"driver": "file", "path": f"{folder}/"}
    # Older versions of Orbax do not say which it is.
    if metadata.get("use_ocdbt", (folder / DATABASE_FILE).is_file()):
        store = {"driver": "ocdbt", "base": store, "path": f"{name}/"}
    else:
        store["path"] += f"{name}/"
    return {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        "kvstore": store,
        # Where Orbax stored zeros like all other numbers, numbers that are not there are lost rather than zeros.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
        "open": True,
    }
