"""T5Gemma's Flax checkpoints (Orbax, from Kaggle), read as if they were Hugging Face checkpoints.

The parameters are those of google-deepmind/gemma: `gemma/research/t5gemma/modules.py`, `gemma/gm/nn/_modules.py` and
`gemma/gm/nn/_layers.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_t5gemma import presets
from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checkpoints.orbax.files import open_orbax, result
from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError, TensorSource
from keras_t5gemma.checkpoints.tensor_table import STACKS, TensorSpec, tensor_specs
from keras_t5gemma.config import T5GemmaConfig

if TYPE_CHECKING:
    import tensorstore

# The published vocabulary, and the rows that Flax's embeddings have after it for UL2's extra ids.
VOCABULARY_SIZE, EXTRA_ROWS = T5GemmaConfig.vocabulary_size, 128
# The field of a stack's config for each letter of `tensor_table`. V and E depend on both stacks.
FIELDS = {
    "D": "hidden_dim",
    "F": "intermediate_dim",
    "N": "num_query_heads",
    "K": "num_key_value_heads",
    "H": "head_dim",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """The place of one kind of tensor in Flax's checkpoints: a column beside a row of `tensor_table`.

    Attributes:
        path: the parameter's path; `{s}` stands for the stack, `{i}` for the layer.
        letters: the parameter's axes, one letter per axis as in the table. A number is an axis on which that many
            tensors are stacked.
        index: the tensor's index on that axis, which is the first; or `None` if there is no such axis.
    """

    path: str
    letters: str
    index: int | None = None


# Our variable within a block, and the parameter within Flax's block. If there are two, either can hold the tensor: if a
# stack has as many key/value heads as query heads, all are stored as one `qkv_einsum`; and `transpose_gating_einsum` is
# set for 9B only.
# fmt: off
_IN_LAYER: dict[str, list[tuple]] = {
    "pre_self_attention_norm/scale":  [("pre_attention_norm/scale", "D")],
    "self_attention/query/kernel":    [("attn/q_einsum/w", "N D H"), ("attn/qkv_einsum/w", "3 N D H", 0)],
    "self_attention/key/kernel":      [("attn/kv_einsum/w", "2 K D H", 0), ("attn/qkv_einsum/w", "3 K D H", 1)],
    "self_attention/value/kernel":    [("attn/kv_einsum/w", "2 K D H", 1), ("attn/qkv_einsum/w", "3 K D H", 2)],
    "self_attention/output/kernel":   [("attn/attn_vec_einsum/w", "N H D")],
    "post_self_attention_norm/scale": [("post_attention_norm/scale", "D")],
    "pre_cross_attention_norm/scale": [("pre_cross_attention_norm/scale", "D")],
    "cross_attention/query/kernel":   [("cross_attn/q_einsum/w", "N D H")],
    "cross_attention/key/kernel":     [("cross_attn/kv_einsum/w", "2 K E H", 0)],
    "cross_attention/value/kernel":   [("cross_attn/kv_einsum/w", "2 K E H", 1)],
    "cross_attention/output/kernel":  [("cross_attn/attn_vec_einsum/w", "N H D")],
    "post_cross_attention_norm/scale": [("post_cross_attention_norm/scale", "D")],
    "pre_feed_forward_norm/scale":    [("pre_ffw_norm/scale", "D")],
    "feed_forward/gate/kernel":       [("mlp/gating_einsum", "2 D F", 0), ("mlp/gating_einsum", "2 F D", 0)],
    "feed_forward/up/kernel":         [("mlp/gating_einsum", "2 D F", 1), ("mlp/gating_einsum", "2 F D", 1)],
    "feed_forward/down/kernel":       [("mlp/linear", "F D")],
    "post_feed_forward_norm/scale":   [("post_ffw_norm/scale", "D")],
}
# fmt: on
COLUMNS = {
    "{s}/token_embedding/embeddings": (Column("{s}/embedder/input_embedding", "V D"),),
    **{
        f"{{s}}/layer_{{i}}/{path}": tuple(Column(f"{{s}}/layer_{{i}}/{name}", *axes) for name, *axes in columns)
        for path, columns in _IN_LAYER.items()
    },
    "{s}/final_norm/scale": (Column("{s}/final_norm/scale", "D"),),
}
# The kinds of tensors whose shapes determine a stack's sizes.
_SIZE_PATHS = (
    "{s}/token_embedding/embeddings",
    "{s}/layer_{i}/feed_forward/down/kernel",
    "{s}/layer_{i}/self_attention/output/kernel",
    "{s}/layer_{i}/self_attention/key/kernel",
)
# A regular expression for the paths of all parameters, in stacks of up to 1,000 layers.
PATHS = "|".join(
    column.path.format(s="(encoder|decoder)", i="(0|[1-9][0-9]{0,2})")
    for columns in COLUMNS.values()
    for column in columns
)


def read_orbax_t5gemma(
    folder: str | os.PathLike[str], config: T5GemmaConfig | None = None
) -> tuple[T5GemmaConfig, OrbaxTensors]:
    """Opens a T5Gemma in Orbax's format: its config and its tensors. Its numbers are not read yet.

    The format holds shapes but no config. The other settings, such as windows and soft caps, are those of the row of
    `presets.STACKS` with the same sizes.

    Args:
        folder: the checkpoint's folder or its parent: on Kaggle a tokenizer may lie beside the checkpoint's folder.
        config: the model's config, if its stacks have other sizes than those in `presets.STACKS`.

    Raises:
        CheckpointError: if the checkpoint is another model's, damaged or incomplete, or its sizes are unknown.
        ImportError: if tensorstore is not installed.
    """
    path, arrays = open_orbax(folder, PATHS)
    config = _recognize_config(path, arrays) if config is None else config
    return config, OrbaxTensors(path, arrays, config)


class OrbaxTensors(TensorSource):
    """A `TensorSource` over an Orbax checkpoint, under the names and in the layout of a Hugging Face checkpoint.

    Args:
        folder: the checkpoint's folder, for messages.
        arrays: the parameters' tensorstores by path.
        config: the model's config.

    Raises:
        CheckpointError: if a parameter is missing, superfluous, of another shape or not of a floating-point dtype.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, tensorstore.TensorStore], config: T5GemmaConfig):
        self.folder = folder
        if not config.tie_embeddings:
            raise CheckpointError(f"{folder}: `tie_embeddings` is False. Expected True, as in every Flax T5Gemma.")
        matches = [(tensor, self._columns(tensor, arrays)) for tensor in tensor_specs(config)]
        if surplus := sorted(arrays.keys() - {columns[0].path for _, columns in matches}):
            raise CheckpointError(
                f"{folder}: {len(surplus)} parameter(s) that this T5Gemma does not have, among them {surplus[0]!r}."
            )
        arrays = _without_extra_rows(folder, arrays, config)
        self._views = {
            tensor.name: (columns[0].path, self._view(tensor, columns, arrays, config), tensor.stored_shape)
            for tensor, columns in matches
        }

    def names(self) -> list[str]:
        """The tensors' names in Hugging Face's checkpoints."""
        return list(self._views)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape as Hugging Face stores it."""
        return self._named(name)[2]

    def dtype(self, name: str) -> np.dtype:
        """The parameter's numpy dtype."""
        return self._named(name)[1].dtype.numpy_dtype

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a new numpy array in Hugging Face's layout."""
        _, view, shape = self._named(name)
        # tensorstore transposes while it reads, into the array that is returned.
        return result(view.read(order="C"), f"{self.where(name)}: tensor {name!r}").reshape(shape)

    def where(self, name: str | None = None) -> str:
        """The checkpoint's folder, and the parameter's path."""
        return str(self.folder) if name is None else f"{self.folder} ({self._named(name)[0]})"

    def _named(self, name: str) -> tuple[str, tensorstore.TensorStore, tuple[int, ...]]:
        """The parameter's path, the view that is the tensor, and the tensor's shape in Hugging Face's layout."""
        if name not in self._views:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}.")
        return self._views[name]

    def _columns(self, tensor: TensorSpec, arrays: Mapping[str, tensorstore.TensorStore]) -> list[Column]:
        """The columns of the one parameter that holds a tensor, with stack and layer filled in.

        A parameter may have two columns, with its axes in another order. `_view` chooses one by the shape.

        Raises:
            CheckpointError: if no parameter holds the tensor, or two do.
        """
        columns = [
            dataclasses.replace(column, path=column.path.format(s=tensor.stack, i=tensor.layer))
            for column in COLUMNS[tensor.row.path]
        ]
        present = [column for column in columns if column.path in arrays]
        if len({column.path for column in present}) != 1:
            paths = dict.fromkeys(column.path for column in columns)
            raise CheckpointError(
                f"{self.folder}: parameter {' or '.join(map(repr, paths))} is missing. Expected for {tensor.name!r}."
                if not present
                else f"{self.folder}: parameters {' and '.join(map(repr, paths))} both hold {tensor.name!r}."
            )
        return present

    def _view(
        self,
        tensor: TensorSpec,
        columns: Sequence[Column],
        arrays: Mapping[str, tensorstore.TensorStore],
        config: T5GemmaConfig,
    ) -> tensorstore.TensorStore:
        """The part of a parameter that is one tensor, with its axes in Hugging Face's order. Reads nothing.

        Args:
            tensor: the tensor.
            columns: the columns of the parameter, from `_columns`.
            arrays: the parameters' tensorstores by path.
            config: the model's config.

        Raises:
            CheckpointError: if the parameter's shape or dtype does not fit.
        """
        array, where = arrays[columns[0].path], f"{self.folder}: parameter {columns[0].path!r}"
        sizes = {letter: getattr(getattr(config, tensor.stack), field) for letter, field in FIELDS.items()}
        sizes |= {"V": config.vocabulary_size, "E": config.encoder.hidden_dim, "2": 2, "3": 3}
        shapes = [tuple(sizes[letter] for letter in column.letters.split()) for column in columns]
        if array.shape not in shapes:
            raise CheckpointError(f"{where} has shape {array.shape}. Expected {' or '.join(map(str, shapes))}.")
        if shapes.count(array.shape) > 1:
            # The wrong order would load without an error and compute another function.
            orders = " or ".join(column.letters for column in columns)
            raise CheckpointError(
                f"{where} has shape {array.shape}, which leaves the order of its axes open: {orders}."
            )
        if array.dtype.numpy_dtype not in DTYPES.values():
            expected = [str(dtype) for dtype in DTYPES.values()]
            raise CheckpointError(f"{where} has dtype {array.dtype.name}. Expected one of {expected}.")
        column = columns[shapes.index(array.shape)]
        axes = column.letters.split()
        if column.index is not None:
            array, axes = array[column.index], axes[1:]
        return array.transpose([axes.index(letter) for letter in tensor.row.stored_letters.replace(" ", "")])


def _without_extra_rows(
    folder: Path, arrays: Mapping[str, tensorstore.TensorStore], config: T5GemmaConfig
) -> Mapping[str, tensorstore.TensorStore]:
    """The arrays, without the embeddings' extra rows if the config has the published vocabulary."""
    paths = [f"{stack}/embedder/input_embedding" for stack in STACKS]
    longer = [path for path in paths if arrays[path].shape[:1] == (VOCABULARY_SIZE + EXTRA_ROWS,)]
    if not longer or config.vocabulary_size != VOCABULARY_SIZE:
        return arrays
    warn_caller(
        f"{folder}: of {VOCABULARY_SIZE + EXTRA_ROWS} rows of the embeddings, the last {EXTRA_ROWS}, UL2's extra ids, "
        f"are dropped, as in every other format of T5Gemma."
    )
    return {**arrays, **{path: arrays[path][:VOCABULARY_SIZE] for path in longer}}


def _recognize_config(folder: Path, arrays: Mapping[str, tensorstore.TensorStore]) -> T5GemmaConfig:
    """The config whose published stacks have the sizes of the arrays' shapes.

    Raises:
        CheckpointError: if no published stack has these sizes.
    """
    stacks: dict[str, Any] = {}
    rows = VOCABULARY_SIZE
    for stack in STACKS:
        sizes = _sizes(arrays, stack)
        rows = sizes.pop("V", rows)
        matching = [row for row in presets.STACKS.values() if all(getattr(row, f) == n for f, n in sizes.items())]
        if not matching:
            listing = ", ".join(f"{field}={size}" for field, size in sizes.items())
            raise CheckpointError(
                f"{folder}: by its parameters' shapes, the {stack} has {listing}. No published "
                f"stack has these sizes ({', '.join(presets.STACKS)}): pass the model's T5GemmaConfig as `config`."
            )
        stacks[stack] = matching[0]
    return T5GemmaConfig(**stacks, vocabulary_size=VOCABULARY_SIZE if rows == VOCABULARY_SIZE + EXTRA_ROWS else rows)


def _sizes(arrays: Mapping[str, tensorstore.TensorStore], stack: str) -> dict[str, int]:
    """The fields of a stack's config that follow from its shapes, and "V", the rows of its embedding.

    Parameters that are missing or have another number of axes are skipped here, and refused by name later.
    """
    prefix = f"{stack}/layer_"
    layers = [int(path.removeprefix(prefix).partition("/")[0]) for path in arrays if path.startswith(prefix)]
    sizes = {"num_layers": 1 + max(layers, default=-1)}
    for column in (column for path in _SIZE_PATHS for column in COLUMNS[path]):
        axes = column.letters.split()
        shape = getattr(arrays.get(column.path.format(s=stack, i=0)), "shape", ())
        if len(shape) == len(axes):
            letters = [(letter, size) for letter, size in zip(axes, shape, strict=True) if letter.isalpha()]
            sizes |= {str(FIELDS.get(letter, letter)): size for letter, size in letters}
    return sizes
