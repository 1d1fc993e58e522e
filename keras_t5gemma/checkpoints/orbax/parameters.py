"""T5Gemma's Flax checkpoints (Orbax, from Kaggle), read as if they were Hugging Face checkpoints.

The parameters are those of google-deepmind/gemma: `gemma/research/t5gemma/modules.py`, `gemma/gm/nn/_modules.py` and
`gemma/gm/nn/_layers.py`.
"""

import dataclasses
import warnings

from keras_t5gemma import presets
from keras_t5gemma.checkpoints.orbax.files import open_orbax, result
from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError, TensorSource
from keras_t5gemma.checkpoints.tensor_table import STACKS, tensor_specs
from keras_t5gemma.config import T5GemmaConfig

# The published vocabulary, and the rows that Flax's embeddings have beyond it for UL2's extra ids.
VOCABULARY_SIZE, EXTRA_ROWS = T5GemmaConfig.vocabulary_size, 128
# The letters of `tensor_table` that a stack's config tells; V and E depend on both stacks.
FIELDS = {
    "D": "hidden_dim",
    "F": "intermediate_dim",
    "N": "num_query_heads",
    "K": "num_key_value_heads",
    "H": "head_dim",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """Where Flax keeps one kind of tensor, beside the row of the table in `tensor_table` with the same path.

    Attributes:
        path: the parameter's; `{s}` stands for the stack, `{i}` for the layer.
        letters: its axes, a letter each as in the table. A number is an axis on which that many tensors are stacked.
        index: the tensor's place on that axis, which is the first; or `None`.
    """

    path: str
    letters: str
    index: int | None = None


# Our layer within a block, and the parameter within Flax's. Where there are two, either holds the tensor: equal numbers
# of query and key/value heads are stored as one `qkv_einsum`, and `transpose_gating_einsum` is set for 9B alone.
# fmt: off
_IN_LAYER = {
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
        f"{{s}}/layer_{{i}}/{path}": tuple(Column(f"{{s}}/layer_{{i}}/{place[0]}", *place[1:]) for place in places)
        for path, places in _IN_LAYER.items()
    },
    "{s}/final_norm/scale": (Column("{s}/final_norm/scale", "D"),),
}
# The kinds whose shapes tell a stack's size.
TELLING = (
    "{s}/token_embedding/embeddings",
    "{s}/layer_{i}/feed_forward/down/kernel",
    "{s}/layer_{i}/self_attention/output/kernel",
    "{s}/layer_{i}/self_attention/key/kernel",
)
# What a parameter may be called, in stacks of up to 1,000 layers.
PATHS = "|".join(
    column.path.format(s="(encoder|decoder)", i="(0|[1-9][0-9]{0,2})")
    for columns in COLUMNS.values()
    for column in columns
)


def read_orbax_t5gemma(folder, config=None):
    """A T5Gemma in Orbax's format as `(T5GemmaConfig, OrbaxTensors)`; none of its numbers are read yet.

    The format tells no more than shapes: what they leave open, such as windows and soft caps, is taken from the row of
    `presets.STACKS` that has them.

    Args:
        folder: the checkpoint's, or the one above it: on Kaggle, a tokenizer may lie beside the checkpoint's folder.
        config: a `T5GemmaConfig`, for stacks of other sizes than those in `presets.STACKS`.

    Raises:
        CheckpointError: if it is another checkpoint, damaged or incomplete, or its sizes are not known ones.
        ImportError: if tensorstore is not installed.
    """
    folder, arrays = open_orbax(folder, PATHS)
    config = _recognized(folder, arrays) if config is None else config
    return config, OrbaxTensors(folder, arrays, config)


class OrbaxTensors(TensorSource):
    """A `TensorSource` over an Orbax checkpoint, under the names and in the layout of a Hugging Face checkpoint.

    Args:
        folder: the checkpoint's, for messages.
        arrays: the parameters' tensorstores by path.
        config: the `T5GemmaConfig` they should make.

    Raises:
        CheckpointError: if a parameter is missing, superfluous, of another shape or no floating-point numbers.
    """

    def __init__(self, folder, arrays, config):
        self.folder = folder
        if not config.tie_embeddings:
            raise CheckpointError(f"{folder}: `tie_embeddings` is False. Expected True, as in every Flax T5Gemma.")
        placed = [(tensor, self._columns(tensor, arrays)) for tensor in tensor_specs(config)]
        if surplus := sorted(arrays.keys() - {columns[0].path for _, columns in placed}):
            raise CheckpointError(
                f"{folder}: {len(surplus)} parameter(s) that this T5Gemma does not have, among them {surplus[0]!r}."
            )
        arrays = _without_extra_rows(folder, arrays, config)
        self._placed = {
            tensor.name: (columns[0].path, self._view(tensor, columns, arrays, config), tensor.stored_shape)
            for tensor, columns in placed
        }

    def names(self):
        """The tensors' names in Hugging Face's checkpoints."""
        return list(self._placed)

    def shape(self, name):
        """The shape as Hugging Face stores it."""
        return self._place(name)[2]

    def dtype(self, name):
        """The parameter's numpy dtype."""
        return self._place(name)[1].dtype.numpy_dtype

    def read(self, name):
        """One tensor as a numpy array of its own, read now, in the layout in which Hugging Face stores it."""
        _, view, shape = self._place(name)
        # tensorstore transposes while it reads, into the one array that is handed out.
        return result(view.read(order="C"), f"{self.where(name)}: tensor {name!r}").reshape(shape)

    def where(self, name=None):
        """The checkpoint's folder, and the parameter."""
        return str(self.folder) if name is None else f"{self.folder} ({self._place(name)[0]})"

    def _place(self, name):
        if name not in self._placed:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}.")
        return self._placed[name]

    def _columns(self, tensor, arrays):
        """The columns, filled in, that may hold a tensor: those whose parameter is there, and that is one parameter."""
        columns = [
            dataclasses.replace(column, path=column.path.format(s=tensor.stack, i=tensor.layer))
            for column in COLUMNS[tensor.row.path]
        ]
        found = [column for column in columns if column.path in arrays]
        if len({column.path for column in found}) != 1:
            paths = dict.fromkeys(column.path for column in columns)
            raise CheckpointError(
                f"{self.folder}: parameter {' or '.join(map(repr, paths))} is missing. Expected for {tensor.name!r}."
                if not found
                else f"{self.folder}: parameters {' and '.join(map(repr, paths))} both hold {tensor.name!r}."
            )
        return found

    def _view(self, tensor, columns, arrays, config):
        """The part of a parameter that is one tensor, its axes in Hugging Face's order; nothing is read."""
        array, where = arrays[columns[0].path], f"{self.folder}: parameter {columns[0].path!r}"
        sizes = {letter: getattr(getattr(config, tensor.stack), field) for letter, field in FIELDS.items()}
        sizes |= {"V": config.vocabulary_size, "E": config.encoder.hidden_dim, "2": 2, "3": 3}
        shapes = [tuple(sizes[letter] for letter in column.letters.split()) for column in columns]
        if array.shape not in shapes:
            raise CheckpointError(f"{where} has shape {array.shape}. Expected {' or '.join(map(str, shapes))}.")
        if shapes.count(array.shape) > 1:
            # The wrong choice would load without complaint and compute something else.
            orders = " or ".join(column.letters for column in columns)
            raise CheckpointError(
                f"{where} has shape {array.shape}, which does not tell the order of its axes: {orders}."
            )
        if array.dtype.numpy_dtype not in DTYPES.values():
            expected = [str(dtype) for dtype in DTYPES.values()]
            raise CheckpointError(f"{where} has dtype {array.dtype.name}. Expected one of {expected}.")
        column = columns[shapes.index(array.shape)]
        axes = column.letters.split()
        if column.index is not None:
            array, axes = array[column.index], axes[1:]
        return array.transpose([axes.index(letter) for letter in tensor.row.stored_letters.replace(" ", "")])


def _without_extra_rows(folder, arrays, config):
    """The arrays, with the extra rows cut off the embeddings where the config has the published vocabulary."""
    paths = [f"{stack}/embedder/input_embedding" for stack in STACKS]
    longer = [path for path in paths if arrays[path].shape[:1] == (VOCABULARY_SIZE + EXTRA_ROWS,)]
    if not longer or config.vocabulary_size != VOCABULARY_SIZE:
        return arrays
    warnings.warn(
        f"{folder}: of {VOCABULARY_SIZE + EXTRA_ROWS} rows of the embeddings, the last {EXTRA_ROWS}, UL2's extra ids, "
        f"are dropped, as in every other format of T5Gemma.",
        stacklevel=4,  # The caller of `read_orbax_t5gemma`.
    )
    return arrays | {path: arrays[path][:VOCABULARY_SIZE] for path in longer}


def _recognized(folder, arrays):
    """The config of published stacks that the arrays' shapes tell."""
    stacks, rows = {}, VOCABULARY_SIZE
    for stack in STACKS:
        sizes = _sizes(arrays, stack)
        rows = sizes.pop("V", rows)
        matching = [row for row in presets.STACKS.values() if all(getattr(row, f) == n for f, n in sizes.items())]
        if not matching:
            found = ", ".join(f"{field}={size}" for field, size in sizes.items())
            raise CheckpointError(
                f"{folder}: by its parameters' shapes, the {stack} has {found}. That is none of the published sizes "
                f"({', '.join(presets.STACKS)}): give its T5GemmaConfig as `config`."
            )
        stacks[stack] = matching[0]
    return T5GemmaConfig(**stacks, vocabulary_size=VOCABULARY_SIZE if rows == VOCABULARY_SIZE + EXTRA_ROWS else rows)


def _sizes(arrays, stack):
    """The fields of a stack's config that its shapes tell, and "V", the rows of its embedding.

    What is missing or has another number of axes tells nothing: it is refused by its name later.
    """
    prefix = f"{stack}/layer_"
    layers = [int(path.removeprefix(prefix).partition("/")[0]) for path in arrays if path.startswith(prefix)]
    sizes = {"num_layers": 1 + max(layers, default=-1)}
    for column in (column for kind in TELLING for column in COLUMNS[kind]):
        axes = column.letters.split()
        shape = getattr(arrays.get(column.path.format(s=stack, i=0)), "shape", ())
        if len(shape) == len(axes):
            known = {letter: size for letter, size in zip(axes, shape, strict=True) if letter.isalpha()}
            sizes |= {FIELDS.get(letter, letter): size for letter, size in known.items()}
    return sizes
