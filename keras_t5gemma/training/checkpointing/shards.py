"""The arrays of a checkpoint: written as the shards that this process holds, and read region by region.

An array is a box of numbers, and so is a shard of it. Boxes are written as Python slices them: a shard of `kernel` with
its rows 20 to 39 is named `kernel[20:40,0:64]`. An array that is whole has its own name alone.
"""

import math
import re
from pathlib import Path

import keras
import numpy as np
from safetensors import safe_open

from keras_t5gemma.checkpoints.processes import process_count, process_index
from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError, TensorSource
from keras_t5gemma.training.checkpointing import step_folder as files
from keras_t5gemma.training.checkpointing.process_folders import part_of, parts_of

_SHARD = re.compile(r"(.*)\[([\d:,]*)\]")


def shards(variables):
    """Copies of what this process holds of some variables, each shard once, on JAX.

    What lies on several processes alike, such as the scales of norms, each of them has: so its own part is all that it
    needs to go on, wherever the others' are.

    Args:
        variables: a dict of them by name.

    Returns:
        `(arrays, shapes)`: numpy arrays by the names of the shards; and by the names of the variables the whole shapes,
        JSON-ready.
    """
    arrays = {}
    for name, variable in variables.items():
        for shard in variable.value.addressable_shards:
            key = f"{name}[{_text(_box(shard.index, variable.shape))}]"
            if key not in arrays:
                arrays[key] = np.array(shard.data, order="C")
    return arrays, {name: [int(size) for size in variable.shape] for name, variable in variables.items()}


def layout():
    """Who saves a part, and over which devices the model lies: for whoever reads it; JSON-ready."""
    distribution = keras.distribution.distribution()
    mesh = None if distribution is None else distribution.device_mesh
    described = None if mesh is None else {"shape": list(map(int, mesh.shape)), "axes": list(mesh.axis_names)}
    return {"process": process_index(), "processes": process_count(), "mesh": described}


class SavedArrays:
    """The arrays of a checkpoint, read by region: of a part the shards in it, or where those do not do, in all parts.

    The other parts are looked at when they are needed, and then checked first.

    Args:
        path: of a checkpoint, or of a process's part of one, that has been checked.
        content: its metadata.
    """

    def __init__(self, path, content):
        self.path, self._layout = Path(path), content.get("layout")
        self._shapes = dict(content.get("shapes", {}))
        self._found = {}  # by name and box: the open file and the key in it
        self._seen = None if part_of(path) is None else {part_of(path)[0]}
        self._open(self.path)

    def names(self, groups):
        """The names of those arrays whose group is among these, sorted: by group and place."""
        return sorted(name for name in self._found if name.partition("/")[0] in groups)

    def shape(self, name):
        """The whole shape of one array."""
        return tuple(self._shapes[name])

    def read(self, name, box=None):
        """One array, or a region of it.

        Args:
            name: of the array.
            box: `((start, stop), ...)`, an axis each; the whole array if None.

        Raises:
            CheckpointError: if not all of it can be read here, or another part is damaged.
        """
        box = tuple((0, size) for size in self.shape(name)) if box is None else box
        overlaps = self._overlaps(name, box)
        if overlaps is None and self._seen is not None:
            self._open_others()
            overlaps = self._overlaps(name, box)
        if overlaps is None:
            raise self._not_here(name, box)
        array = None
        for common, shard in overlaps.items():
            file, key = self._found[name][shard]
            if shard == box:
                return file.get_tensor(key)
            piece = file.get_slice(key)[_slices(common, shard)]
            array = np.empty([stop - start for start, stop in box], piece.dtype) if array is None else array
            array[_slices(common, box)] = piece
        return array

    def _overlaps(self, name, box):
        """The boxes that make that region together, each with the shard that has it; None where they do not."""
        shards = self._found[name]
        if box in shards:
            return {box: box}
        overlaps = {_overlap(shard, box): shard for shard in shards}
        overlaps.pop(None, None)
        # Shards of one array are cut by one layout: none overlaps another.
        return overlaps if sum(map(_volume, overlaps)) == _volume(box) else None

    def _open(self, path):
        """Adds a folder's file of arrays: the regions of each array, and where they lie."""
        file = safe_open(path / files.ARRAYS_FILE, framework="numpy")
        for key in file.keys():  # noqa: SIM118 it is no dict
            shard = _SHARD.fullmatch(key)
            if shard is None:
                self._shapes[key] = file.get_slice(key).get_shape()
            name = key if shard is None else shard[1]
            box = tuple((0, size) for size in self._shapes[name]) if shard is None else _parsed(shard[2])
            self._found.setdefault(name, {})[box] = file, key

    def _open_others(self):
        for index, path in parts_of(self.path).items():
            if index not in self._seen:
                files.verified(path)
                self._open(path)
                self._seen.add(index)

    def _not_here(self, name, box):
        saved, now = self._layout, layout()
        return CheckpointError(
            f"{self.path}: {name}[{_text(box)}] lies in no part that can be read here. The checkpoint was saved by "
            f"{saved['processes']} process(es) over the mesh {saved['mesh']}. This is process {now['process']} of "
            f"{now['processes']} over {now['mesh']}, and sees the parts of processes {sorted(self._seen)}. Use that "
            f"mesh and as many processes, or have all their folders in {self.path.parent.parent}."
        )


class SavedTensors(TensorSource):
    """A T5Gemma's weights in a checkpoint's parts as a `TensorSource` under Hugging Face's names.

    Args:
        saved: the `SavedArrays`.
        tensors: of the model's config, as `tensor_table.tensor_specs` gives them.
    """

    def __init__(self, saved, tensors):
        self._saved = saved
        self._tensors = {tensor.name: tensor for tensor in tensors}
        # A name is group, place and the variable's path.
        self._names = {name.split("/", 2)[2]: name for name in saved.names(("model",))}

    def names(self):
        """The names in a Hugging Face T5Gemma."""
        return list(self._tensors)

    def shape(self, name):
        """The shape as Hugging Face stores it."""
        return self._tensors[name].stored_shape

    def dtype(self, name):
        """As saved."""
        saved = self._names[self._tensors[name].path]
        corner = tuple((0, min(1, size)) for size in self._saved.shape(saved))
        return self._saved.read(saved, corner).dtype

    def read(self, name):
        """One tensor, put together."""
        tensor = self._tensors[name]
        return tensor.to_stored(self._saved.read(self._names[tensor.path]))

    def where(self, name=None):
        """The path, and the variable's."""
        return str(self._saved.path) if name is None else f"{self._saved.path} ({self._tensors[name].path})"


def put(variable, read):
    """Fills a variable: where it is cut in shards, shard by shard, and never whole.

    Args:
        variable: a Keras variable.
        read: called with a box, gives that region as numpy.
    """
    value = variable.value
    if keras.config.backend() == "jax" and len(value.sharding.device_set) > 1:
        import jax

        shape, known = tuple(value.shape), {}

        def shard(index):
            box = _box(index, shape)
            if box not in known:
                known[box] = read(box)
            return known[box]

        variable.assign(jax.make_array_from_callback(shape, value.sharding, shard))
        return
    array = read(tuple((0, int(size)) for size in variable.shape))
    # Not every backend takes numpy's bfloat16; through float32 it comes back the same.
    variable.assign(array.astype("float32") if array.dtype == DTYPES["BF16"] else array)


def mean(saved, names):
    """What reads a region's mean over several checkpoints, as float64 sums; of whole numbers the last one's.

    Args:
        saved: a list of `SavedArrays`, oldest first.
        names: of the same array in each.
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


def _box(index, shape):
    """Slices as JAX gives them, which may leave both ends out, as `((start, stop), ...)`."""
    return tuple(part.indices(int(size))[:2] for part, size in zip(index, shape, strict=True))


def _text(box):
    return ",".join(f"{start}:{stop}" for start, stop in box)


def _parsed(text):
    return tuple(tuple(map(int, part.split(":"))) for part in text.split(",") if part)


def _overlap(box, other):
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _volume(box):
    return math.prod(stop - start for start, stop in box)


def _slices(box, within):
    """The slices of a box in an array that is another box."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, within, strict=True))
