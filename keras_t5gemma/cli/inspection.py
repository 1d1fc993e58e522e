"""The tables that `inspect` prints."""

import dataclasses
import math

from rich.table import Table

from keras_t5gemma import presets
from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config
from keras_t5gemma.checkpoints.keras_formats.layouts import GEMMA2
from keras_t5gemma.checkpoints.sources import Source, gemma2_source, open_checkpoint, open_gemma2, stacks_source
from keras_t5gemma.checkpoints.tensor_source import TensorSource
from keras_t5gemma.config import StackConfig, T5GemmaConfig, T5GemmaEncoderConfig


def recognize(model: str) -> tuple[str, Source]:
    """Opens a checkpoint of either architecture, and checks its tensors against its config.

    Args:
        model: an argument of `from_preset` or `adapt_gemma2`.

    Returns:
        `(title, source)`: a title for a table, and the `Source`.

    Raises:
        ValueError: if the checkpoint has another architecture, or its tensors are not those of its config.
    """
    folder = open_gemma2(model) if str(model).startswith("gemma2") else open_checkpoint(model)
    if folder.config is None:
        return f"T5Gemma, Flax's Orbax checkpoint, {folder}", stacks_source(folder)
    config = folder.config
    if folder.is_hugging_face:
        is_gemma2, where = config["model_type"] == "gemma2", "Hugging Face format"
    else:
        is_gemma2, where = config["registered_name"] in GEMMA2.registered_names, "Keras preset"
    source: Source = gemma2_source(folder) if is_gemma2 else stacks_source(folder)
    kind = "Gemma 2" if is_gemma2 else "T5Gemma"
    if isinstance(source.config, T5GemmaEncoderConfig):
        kind = "T5Gemma's encoder"
    return f"{kind}, {where}, {folder}", source


def config_table(title: str, config: T5GemmaConfig | T5GemmaEncoderConfig | Gemma2Config) -> Table:
    """A rich table of a config: the stacks side by side, and below them the settings of the model."""
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


def size_name(stack: StackConfig) -> str:
    """The published size of a stack, for any dropout, or "none of the published"."""

    def for_inference(stack: StackConfig) -> StackConfig:
        return dataclasses.replace(stack, dropout=0.0, initializer_range=1.0)

    names = [name for name, row in presets.STACKS.items() if for_inference(row) == for_inference(stack)]
    return names[0] if names else "none of the published"


def totals_table(source: Source) -> Table:
    """A rich table of tensors, parameters, bytes and dtypes, per stack and in total."""
    groups = {"decoder-only": source.tensors.names()}
    if not isinstance(source.config, Gemma2Config):
        groups = {
            stack: [name for name in source.tensors.names() if name.startswith(f"model.{stack}.")]
            for stack in source.config.stacks
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


def tensor_table(tensors: TensorSource) -> Table:
    """A rich table of all tensors: name, shape, dtype and bytes."""
    table = Table()
    for heading in ("tensor", "shape", "dtype", "bytes"):
        table.add_column(heading, justify="right" if heading == "bytes" else "left")
    for name in tensors.names():
        shape = " x ".join(map(str, tensors.shape(name)))
        table.add_row(name, shape, str(tensors.dtype(name)), f"{tensors.nbytes(name):,}")
    return table
