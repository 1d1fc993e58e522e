"""ONNX graphs, written node by node, and the one file of weights that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_t5gemma.exports.model_parts import Weights

# Of the standard operators. 20 is the first with Gelu.
OPSET = 20
# Version 9 of the file format belongs to this opset, so older runtimes with the opset read the files.
IR_VERSION = 9
DATA_FILE = "model.onnx_data"
# Offsets of large tensors are multiples of a page, so that the file can be mapped into memory; of small ones, of 64.
_PAGE, _LARGE = 4096, 2**20
# A protobuf cannot be larger than 2 GB. So every kernel is outside, and only numbers and norms are inside.
_LARGEST_INSIDE = 2**16


class SharedWeights:
    """The kernels and embeddings of all graphs of a folder, in one file. Each is written once, at its first use.

    Args:
        path: the file to create.
        weights: the model's tensors.
    """

    def __init__(self, path: Path, weights: Weights):
        self._path = path
        self._weights = weights
        self._entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        path.touch()

    def scale(self, path: str) -> np.ndarray:
        """One plus the scale of a norm, float32 [D]."""
        return 1 + self._weights.kernel(f"{path}/scale").astype("float32")

    def __contains__(self, path: str) -> bool:
        return path in self._weights

    def entry(self, path: str) -> tuple[tuple[int, ...], int, int]:
        """`(shape, offset, bytes)` of a tensor by the path of its variable, in our layout and in float32."""
        if path not in self._entries:
            self._entries[path] = self.write(self._weights.kernel(path))
        return self._entries[path]

    def write(self, array: np.ndarray) -> tuple[tuple[int, ...], int, int]:
        """Appends an array to the file, in float32."""
        array = np.ascontiguousarray(array, "float32")
        with self._path.open("ab") as file:
            file.write(b"\0" * (-file.tell() % (_PAGE if array.nbytes >= _LARGE else 64)))
            offset = file.tell()
            file.write(array.data)
        return array.shape, offset, array.nbytes


class Graph:
    """A graph that is built by calling operators, which return the names of their results.

    Args:
        shared: the weights.
    """

    def __init__(self, shared: SharedWeights):
        self.shared = shared
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, dtype: str, *shape: int | str) -> str:
        """Declares an input; names in a shape are sizes that are known when the graph runs."""
        self._inputs.append(_value(name, dtype, shape))
        return name

    def output(self, result: str, name: str, dtype: str, *shape: int | str) -> None:
        """Declares a result as an output of the graph under a name."""
        self.op("Identity", result, name=name)
        self._outputs.append(_value(name, dtype, shape))

    def op(self, kind: str, *inputs: str | Sequence | float, name: str | None = None, **attributes: Any) -> str:
        """Adds a node with one result.

        Args:
            kind: the operator.
            *inputs: names of results; or lists of integers, for shapes and axes; or numbers, for float32.
            name: of the result; made up if it is None.
            **attributes: of the operator.

        Returns:
            The name of the result.
        """
        return self.ops(kind, 1, *inputs, names=None if name is None else [name], **attributes)[0]

    def ops(
        self, kind: str, count: int, *inputs: str | Sequence | float, names: list[str] | None = None, **attributes: Any
    ) -> list[str]:
        """Adds a node with several results; otherwise as `op`."""
        import onnx

        names = names or [f"{kind}_{len(self._nodes)}_{i}" for i in range(count)]
        found = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        self._nodes.append(onnx.helper.make_node(kind, found, names, name=f"{kind}_{len(self._nodes)}", **attributes))
        return names

    def constant(self, value: np.ndarray | Sequence | float) -> str:
        """A small array inside the graph: float32, or int64 for integers."""
        import onnx

        array = np.asarray(value)
        if array.dtype != bool:
            array = array.astype("int64" if array.dtype.kind == "i" else "float32")
        name = f"constant_{len(self._initializers)}"
        if array.nbytes > _LARGEST_INSIDE:
            return self._outside(name, *self.shared.write(array))
        self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def weight(self, path: str) -> str:
        """A kernel or an embedding by the path of its variable, in the shared file."""
        return path if path in self._initializers else self._outside(path, *self.shared.entry(path))

    def model(self, name: str) -> Any:
        """The graph as an `onnx.ModelProto`."""
        import onnx

        graph = onnx.helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opset = [onnx.helper.make_opsetid("", OPSET)]
        return onnx.helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="keras_t5gemma")

    def _outside(self, name: str, shape: tuple[int, ...], offset: int, nbytes: int) -> str:
        """An initializer whose numbers are in the shared file."""
        import onnx

        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", DATA_FILE), ("offset", offset), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        assert nbytes == 4 * math.prod(shape)
        self._initializers[name] = tensor
        return name


def _value(name: str, dtype: str, shape: Sequence[int | str]) -> Any:
    import onnx

    types = {"int64": onnx.TensorProto.INT64, "float32": onnx.TensorProto.FLOAT}
    return onnx.helper.make_tensor_value_info(name, types[dtype], list(shape))
