"""The tables that `inspect` prints."""

import dataclasses
import math

from rich.table import Table

from keras_t5gemma import presets
from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config
from keras_t5gemma.checkpoints.hugging_face.reader import read_json
from keras_t5gemma.checkpoints.keras_formats.layouts import GEMMA2
from keras_t5gemma.checkpoints.sources import gemma2_source, locate_gemma2, locate_t5gemma, t5gemma_source
from keras_t5gemma.config import StackConfig


def recognise(model):
    """A checkpoint's title and its `Source`, whose tensors are those of its config.

    Args:
        model: what `from_preset` or `adapt_gemma2` takes.

    Raises:
        ValueError: where it is another architecture, or its tensors are not those of its config.
    """
    folder = locate_gemma2(model) if str(model).startswith("gemma2") else locate_t5gemma(model)
    if not (folder / "config.json").is_file():
        return f"T5Gemma, Flax's Orbax checkpoint, {folder}", t5gemma_source(folder)
    config = read_json(folder / "config.json")
    if presets.is_hugging_face(folder):
        is_gemma2, where = config["model_type"] == "gemma2", "Hugging Face format"
    else:
        is_gemma2, where = config["registered_name"] in GEMMA2.registered_names, "Keras preset"
    source = (gemma2_source if is_gemma2 else t5gemma_source)(folder)
    return f"{'Gemma 2' if is_gemma2 else 'T5Gemma'}, {where}, {folder}", source


def config_table(title, config):
    """A rich table: the stacks side by side, what they share below."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    stacks = {name: value for name, value in values.items() if isinstance(value, StackConfig)}
    table = Table(title=title)
    for heading in ("", *stacks):
        table.add_column(heading)
    table.add_row("size", *map(size_name, stacks.values()))
    for field in dataclasses.fields(StackConfig):
        table.add_row(field.name, *(str(stack.to_dict()[field.name]) for stack in stacks.values()))
    table.add_section()
    for name, value in values.items():
        if name not in stacks:
            table.add_row(name, str(value))
    return table


def size_name(stack):
    """The published size a stack has, whatever its dropout, or "none of the published"."""

    def computed(stack):
        return dataclasses.replace(stack, dropout=0.0, initializer_range=1.0)

    names = [name for name, row in presets.STACKS.items() if computed(row) == computed(stack)]
    return names[0] if names else "none of the published"


def totals_table(source):
    """A rich table: tensors, parameters, bytes and dtypes of each stack, and of all."""
    groups = {"decoder-only": source.tensors.names()}
    if not isinstance(source.config, Gemma2Config):
        groups = {
            stack: [name for name in source.tensors.names() if name.startswith(f"model.{stack}.")]
            for stack in ("encoder", "decoder")
        }
        groups["all"] = source.tensors.names()
    table = Table()
    for heading in ("", "tensors", "parameters", "GB", "dtype"):
        table.add_column(heading, justify="right" if heading not in ("", "dtype") else "left")
    for title, names in groups.items():
        parameters = sum(math.prod(source.tensors.shape(name)) for name in names)
        size = sum(map(source.tensors.nbytes, names)) / 1e9
        dtypes = ", ".join(sorted({str(source.tensors.dtype(name)) for name in names}))
        table.add_row(title, f"{len(names):,}", f"{parameters:,}", f"{size:.3f}", dtypes)
    return table


def tensor_table(tensors):
    """A rich table: every tensor with its shape, dtype, bytes and file."""
    table = Table()
    for heading in ("tensor", "shape", "dtype", "bytes"):
        table.add_column(heading, justify="right" if heading == "bytes" else "left")
    for name in tensors.names():
        shape = " x ".join(map(str, tensors.shape(name)))
        table.add_row(name, shape, str(tensors.dtype(name)), f"{tensors.nbytes(name):,}")
    return table
