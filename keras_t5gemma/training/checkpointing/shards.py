"""The arrays of a checkpoint: written as the shards that this process holds, and read region by region.

A box is a region of an array, `((start, stop), ...)`, one pair per axis. A shard is named by its array and its box, as
Python slices it: the shard of `kernel` with rows 20 to 39 is `kernel[20:40,0:64]`. A whole array has its plain name.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import keras
import numpy as np
from safetensors import safe_open

from keras_t5gemma._keras_internals import variable_array
from keras_t5gemma.checkpoints.processes import process_count, process_index
from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError, TensorSource
from keras_t5gemma.checkpoints.tensor_table import TensorSpec
from keras_t5gemma.training.checkpointing import step_folder
from keras_t5gemma.training.checkpointing.process_folders import part_of, parts_of

_SHARD = re.compile(r"(.*)\[([\d:,]*)\]")

Box = tuple[tuple[int, int], ...]


def local_shards(variables: dict[str, keras.Variable]) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Copies of the shards of variables on this process's devices, each shard once.

    On PyTorch each array is one shard. Arrays that are replicated over processes, such as the scales of norms, are
    copied by each of them. So a process can resume from its own part, even if it does not see the others.

    Args:
        variables: `keras.Variable`s by name.

    Returns:
        `(arrays, shapes)`: numpy arrays by the names of the shards; and the whole shapes by the names of the variables,
        JSON-ready.
    """
    arrays = {}
    for name, variable in variables.items():
        if keras.config.backend() != "jax":
            arrays[f"{name}[{_text(tuple((0, int(size)) for size in variable.shape))}]"] = host_array(variable)
            continue
        for shard in variable.value.addressable_shards:
            key = f"{name}[{_text(_box(shard.index, variable.shape))}]"
            if key not in arrays:
                arrays[key] = np.array(shard.data, order="C")
    return arrays, {name: [int(size) for size in variable.shape] for name, variable in variables.items()}


def host_array(variable: keras.Variable) -> np.ndarray:
    """A copy of a variable's value."""
    array = np.asarray(variable_array(variable))
    # Contiguous, owned, and of the variable's dtype: some backends return bfloat16 as float32.
    return np.array(array, dtype=DTYPES["BF16"] if str(variable.dtype) == "bfloat16" else array.dtype, order="C")


def layout() -> dict:
    """The process that saves a part, and the mesh of the model, for error messages; JSON-ready."""
    distribution = keras.distribution.distribution()
    mesh = None if distribution is None else distribution.device_mesh
    mesh = None if mesh is None else {"shape": list(map(int, mesh.shape)), "axes": list(mesh.axis_names)}
    return {"process": process_index(), "processes": process_count(), "mesh": mesh}


class SavedArrays:
    """The arrays of a checkpoint, read by region.

    Of a checkpoint in parts, shards are read from this process's part, and from the other parts if it lacks them. The
    other parts are opened only then, after a check.

    Args:
        path: a checkpoint, or a process's part of one, that has been checked.
        content: its metadata.
    """

    def __init__(self, path: str | Path, content: dict):
        self.path, self._layout = Path(path), content.get("layout")
        self._shapes = dict(content.get("shapes", {}))
        self._shards = {}  # by name and box: the open file and the key in it
        self._open_parts = None if part_of(path) is None else {part_of(path)[0]}
        self._open(self.path)

    def names(self, groups: Sequence[str]) -> list[str]:
        """The names of the arrays of some groups, sorted by group and position."""
        return sorted(name for name in self._shards if name.partition("/")[0] in groups)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape of one array."""
        return tuple(self._shapes[name])

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """One array, or a region of it.

        Args:
            name: the array's name.
            box: the region; the whole array if None.

        Raises:
            CheckpointError: if a shard is in no part that this process can read, or another part is damaged.
        """
        box = tuple((0, size) for size in self.shape(name)) if box is None else box
        overlaps = self._overlaps(name, box)
        if overlaps is None and self._open_parts is not None:
            self._open_other_parts()
            overlaps = self._overlaps(name, box)
        if overlaps is None:
            raise self._not_found(name, box)
        array = None
        for common, shard in overlaps.items():
            file, key = self._shards[name][shard]
            if shard == box:
                return file.get_tensor(key)
            piece = file.get_slice(key)[_slices(common, shard)]
            array = np.empty([stop - start for start, stop in box], piece.dtype) if array is None else array
            array[_slices(common, box)] = piece
        return array

    def _overlaps(self, name: str, box: Box) -> dict[Box, Box] | None:
        """The open shards that cover a region: the overlap of each with the region, and the shard's own box.

        None if they do not cover it.
        """
        shards = self._shards[name]
        if box in shards:
            return {box: box}
        overlaps = {_overlap(shard, box): shard for shard in shards}
        overlaps.pop(None, None)
        # All shards of an array follow one layout, so they are disjoint and their volumes add up.
        return overlaps if sum(map(_volume, overlaps)) == _volume(box) else None

    def _open(self, path: Path) -> None:
        """Opens the arrays of a checkpoint or a part, and adds their shards."""
        file = safe_open(path / step_folder.ARRAYS_FILE, framework="numpy")
        for key in file.keys():  # noqa: SIM118 it is not a dict
            shard = _SHARD.fullmatch(key)
            if shard is None:
                self._shapes[key] = file.get_slice(key).get_shape()
            name = key if shard is None else shard[1]
            box = tuple((0, size) for size in self._shapes[name]) if shard is None else _parsed(shard[2])
            self._shards.setdefault(name, {})[box] = file, key

    def _open_other_parts(self) -> None:
        """Checks and opens all other parts that this process can see."""
        for index, path in parts_of(self.path).items():
            if index not in self._open_parts:
                step_folder.verified(path)
                self._open(path)
                self._open_parts.add(index)

    def _not_found(self, name: str, box: Box) -> CheckpointError:
        """The error for a region that the open parts do not cover."""
        saved, now = self._layout, layout()
        return CheckpointError(
            f"{self.path}: {name}[{_text(box)}] lies in no part that can be read here. The checkpoint was saved by "
            f"{saved['processes']} process(es) over the mesh {saved['mesh']}. This is process {now['process']} of "
            f"{now['processes']} over {now['mesh']}, and sees the parts of processes {sorted(self._open_parts)}. Use "
            f"that mesh and as many processes, or copy all their folders into {self.path.parent.parent}."
        )


class SavedTensors(TensorSource):
    """A T5Gemma's weights in a checkpoint's parts as a `TensorSource` under Hugging Face's names.

    Args:
        saved: the `SavedArrays`.
        specs: the result of `tensor_table.tensor_specs` for the model's config.
    """

    def __init__(self, saved: SavedArrays, specs: Iterable[TensorSpec]):
        self._saved = saved
        self._specs = {spec.name: spec for spec in specs}
        # A saved name consists of group, position and the variable's path.
        self._names = {name.split("/", 2)[2]: name for name in saved.names(("model",))}

    def names(self) -> list[str]:
        """The names in a Hugging Face T5Gemma."""
        return list(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape as Hugging Face stores it."""
        return self._specs[name].stored_shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype in the checkpoint."""
        saved = self._names[self._specs[name].path]
        corner = tuple((0, min(1, size)) for size in self._saved.shape(saved))
        return self._saved.read(saved, corner).dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor, assembled from its shards."""
        spec = self._specs[name]
        return spec.to_stored(self._saved.read(self._names[spec.path]))

    def where(self, name: str | None = None) -> str:
        """The path of the checkpoint, and the path of the variable."""
        return str(self._saved.path) if name is None else f"{self._saved.path} ({self._specs[name].path})"


def fill(variable: keras.Variable, read: Callable[[Box], np.ndarray]) -> None:
    """Assigns to a variable; a sharded variable is filled shard by shard, and its whole array is never in memory.

    Args:
        variable: a Keras variable.
        read: returns a region as a numpy array.
    """
    value = variable.value
    if keras.config.backend() == "jax" and len(value.sharding.device_set) > 1:
        import jax

        shape, cached = tuple(value.shape), {}

        def shard(index):
            box = _box(index, shape)
            if box not in cached:
                cached[box] = read(box)
            return cached[box]

        variable.assign(jax.make_array_from_callback(shape, value.sharding, shard))
        return
    array = read(tuple((0, int(size)) for size in variable.shape))
    # Not every backend accepts numpy's bfloat16; the conversion through float32 is exact.
    variable.assign(array.astype("float32") if array.dtype == DTYPES["BF16"] else array)


def mean_reader(saved: list[SavedArrays], names: Sequence[str]) -> Callable[[Box], np.ndarray]:
    """A function that reads a region's mean over several checkpoints, summed in float64.

    Arrays of integers are read from the last checkpoint.

    Args:
        saved: a list of `SavedArrays`, oldest first.
        names: the name of the array in each.
    """
    if len(saved) == 1:
        return lambda box: saved[0].read(names[0], box)

    def read(box):
        last = saved[-1].read(names[-1], box)
        if last.dtype not in DTYPES.values():
            return last
        total = np.zeros(last.shape, "float64")
        for arrays, name in zip(saved, names, strict=True):
            total += arrays.read(name, box).astype("float64")
        return (total / len(saved)).astype(last.dtype)

    return read


def _box(index: tuple[slice, ...], shape: Sequence[int]) -> Box:
    """The box of JAX's slices, which may leave both ends out."""
    return tuple(part.indices(int(size))[:2] for part, size in zip(index, shape, strict=True))


def _text(box: Box) -> str:
    """A box as in a shard's name."""
    return ",".join(f"{start}:{stop}" for start, stop in box)


def _parsed(text: str) -> Box:
    """The inverse of `_text`."""
    return tuple(tuple(map(int, part.split(":"))) for part in text.split(",") if part)


def _overlap(box: Box, other: Box) -> Box | None:
    """The intersection of two boxes, or None if it is empty."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _volume(box: Box) -> int:
    """The number of elements."""
    return math.prod(stop - start for start, stop in box)


def _slices(box: Box, within: Box) -> tuple[slice, ...]:
    """The slices of a box in an array that has the region `within`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, within, strict=True))
