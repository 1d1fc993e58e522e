"""Keras presets on disk, read as if they were Hugging Face checkpoints. Needs no Keras.

The weights are in `model.weights.h5`, or in shards with `model.weights.json` as their index.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic

import h5py
import numpy as np

from keras_t5gemma.checkpoints.hugging_face.reader import is_plain_name, read_json
from keras_t5gemma.checkpoints.keras_formats.layouts import AnyConfig, Layout, expected_tensors, stored_shape, to_stored
from keras_t5gemma.checkpoints.tensor_source import CHUNK_BYTES, DTYPES, CheckpointError, TensorSource
from keras_t5gemma.hub import PresetFolder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.weights.h5"
INDEX_FILE = "model.weights.json"
TASK_FILE = "task.json"
_REMEDIES = {
    "quantization": "Read the model from before `quantize`.",
    "lora": "Load it, call `backbone.merge_lora()`, and save the result.",
}


class KerasPreset(TensorSource, Generic[AnyConfig]):
    """The tensors of a Keras preset, under the names and in the layout of a Hugging Face checkpoint.

    Args:
        folder: the preset's folder.
        layouts: the layouts of the model classes that are accepted.
        config: the parsed `config.json` of the folder, or None to read it.

    Raises:
        CheckpointError: if the preset holds another model, a file is missing or damaged, the index names a file outside
            the folder, or a tensor is missing or superfluous.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        layouts: Sequence[Layout[AnyConfig]],
        config: dict[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        path = self.folder / CONFIG_FILE
        saved = read_json(path) if config is None else config
        name = saved.get("registered_name")
        layout = next((layout for layout in layouts if name in layout.registered_names), None)
        if layout is None:
            expected = " or ".join(layout.registered_names[0] for layout in layouts)
            if isinstance(name, str) and name.startswith("keras_t5gemma>"):
                expected += f". This one is loaded by `{name.partition('>')[2]}.from_preset`"
            raise CheckpointError(f"{path}: a Keras preset of {name!s:.200}. Expected {expected}.")
        try:
            self.config = layout.read_config(saved["config"], str(path))
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: {type(error).__name__}: {error!s:.400}") from error
        for key, state in (("quantization", "quantized"), ("lora", "with LoRA")):
            if key in saved["config"]:
                raise CheckpointError(
                    f"{path}: the model was saved {state}, and only `T5GemmaBackbone.from_preset` and "
                    f"`T5GemmaSeq2SeqLM.from_preset` read it. {_REMEDIES[key]}"
                )
        self._locations: dict[str, tuple[Path, str, str, str]] = {}
        datasets = {group: place for group, place in self._files().items() if "/vars/" in group}
        # Checked before the table is built, which an absurd number of layers would let fill the memory.
        stacks = [getattr(self.config, name, None) for name in ("encoder", "decoder", "stack")]
        if len(datasets) < sum(stack.num_layers for stack in stacks if stack is not None):
            raise CheckpointError(f"{self.folder}: {len(datasets)} tensors, fewer than {CONFIG_FILE} has layers.")
        for name, tensor in expected_tensors(self.config).items():
            place = layout.place(tensor)
            group = f"layers/{place.group}/vars/{place.index}"
            if group not in datasets:
                raise CheckpointError(f"{self.folder}: {group!r}, which is the tensor {name!r}, is missing.")
            self._locations[name] = (*datasets.pop(group), place.letters, tensor.row.stored_letters)
        if datasets:
            group, (path, _) = next(iter(datasets.items()))
            raise CheckpointError(
                f"{path}: {len(datasets)} tensor(s) that the model does not have by its config, among them {group!r}."
            )

    def names(self) -> list[str]:
        """The tensors' names in Hugging Face's checkpoints."""
        return list(self._locations)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape as Hugging Face stores it."""
        _, group, letters, stored = self._locations[name]
        with self._dataset(name) as dataset:
            if len(dataset.shape or ()) != len(letters.split()):
                raise CheckpointError(
                    f"{self.where(name)}: {group!r} has shape {dataset.shape}. Expected the axes {letters}."
                )
            return stored_shape(dataset.shape, letters, stored)

    def dtype(self, name: str) -> np.dtype:
        """The numpy dtype. Keras stores bfloat16 as untyped two-byte items and names the dtype in an attribute."""
        with self._dataset(name) as dataset:
            return _dtype(dataset)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a numpy array in Hugging Face's layout."""
        _, _, letters, stored = self._locations[name]
        with self._dataset(name) as dataset:
            return to_stored(dataset[()].view(_dtype(dataset)), letters, stored)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Reads one tensor in flat pieces; reads it whole first if its layout is not Hugging Face's."""
        _, _, letters, stored = self._locations[name]
        if letters != stored:
            yield from super().chunks(name)
            return
        with self._dataset(name) as dataset:
            dtype = _dtype(dataset)
            rows = max(1, CHUNK_BYTES // max(1, dataset.nbytes // max(1, len(dataset))))
            for start in range(0, len(dataset), rows):
                yield dataset[start : start + rows].view(dtype).reshape(-1)

    def where(self, name: str | None = None) -> str:
        """The path of the file that holds the tensor; without a name, of the folder."""
        return str(self.folder if name is None else self._locations[name][0])

    def _dataset(self, name: str) -> _OpenDataset:
        path, group, *_ = self._locations[name]
        return _OpenDataset(path, group, name)

    def _files(self) -> dict[str, tuple[Path, str]]:
        """(file, path within the file) of each dataset, by its path in Keras's current format."""
        if (self.folder / WEIGHTS_FILE).is_file():
            return _datasets(self.folder / WEIGHTS_FILE)
        index = self.folder / INDEX_FILE
        if not index.is_file():
            raise CheckpointError(f"{self.folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}.")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no `weight_map` from groups to files.")
        files = {}
        listed = [file for value in weight_map.values() for file in (value if isinstance(value, list) else [value])]
        for file in dict.fromkeys(map(str, listed)):
            if not is_plain_name(file, ".h5"):
                raise CheckpointError(
                    f"{index} names {file!r:.200}. Expected the plain name of an .h5 file in the same folder."
                )
            for group, place in _datasets(self.folder / file).items():
                if group in files:
                    raise CheckpointError(f"{self.folder / file}: {group!r} is in {files[group][0].name} too.")
                files[group] = place
        return files


def saved_task(folder: PresetFolder) -> dict[str, Any]:
    """The `task.json` of a task of this package; empty if the folder has none, or keras-hub's own."""
    saved = read_json(folder / TASK_FILE) if (folder / TASK_FILE).is_file() else {}
    return saved if str(saved.get("registered_name")).startswith("keras_t5gemma>") else {}


def check_task(folder: PresetFolder, name: str) -> None:
    """Refuses the Keras preset of another task of this package, such as a classifier that is loaded as a generator.

    Args:
        folder: a checkpoint's.
        name: the name of the task's class.

    Raises:
        CheckpointError: if the folder is another task's; the message names the class that loads it.
    """
    found = str(saved_task(folder).get("registered_name", name)).rpartition(">")[2]
    if found != name:
        raise CheckpointError(
            f"{folder / TASK_FILE}: a Keras preset of a {found}. Expected a {name}. It is loaded by "
            f"`{found}.from_preset`."
        )


class _OpenDataset:
    """Context manager: an open h5 dataset. Errors within the block become `CheckpointError`s."""

    def __init__(self, path: Path, group: str, name: str):
        self._path, self._group, self._name = path, group, name

    def __enter__(self) -> Any:  # An `h5py.Dataset`, whose items h5py's own annotations do not know as arrays.
        try:
            self._file = h5py.File(self._path, "r")
        except Exception as error:
            raise self._unreadable(error) from error
        try:
            return self._file[self._group]
        except Exception as error:
            self._file.close()
            raise self._unreadable(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        # For a damaged file h5py raises errors of many types, from OSError to TypeError.
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self._path}: tensor {self._name!r} cannot be read: {error}")


def _datasets(path: Path) -> dict[str, tuple[Path, str]]:
    """The datasets in one h5 file, in the form of `KerasPreset._files`.

    `visititems` follows no links, so no dataset of another file is listed.
    """
    datasets: dict[str, tuple[Path, str]] = {}

    def visit(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            if item.is_virtual or item.external:
                raise CheckpointError(f"{path}: the data of {name!r} lie in another file, which is not read.")
            # Earlier releases of Keras had another name for the group of a model's layers. Keras still reads it.
            datasets[name.replace("_layer_checkpoint_dependencies/", "layers/", 1)] = path, name

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except CheckpointError:
        raise
    except Exception as error:  # Of many types, as in `_OpenDataset`.
        raise CheckpointError(f"{path} cannot be read as HDF5: {error}") from error
    return datasets


def _dtype(dataset: h5py.Dataset) -> np.dtype:
    dtype = dataset.dtype
    if dataset.attrs.get("dtype") == "bfloat16" and dtype.itemsize == 2:
        return DTYPES["BF16"]
    return np.dtype(dtype)
