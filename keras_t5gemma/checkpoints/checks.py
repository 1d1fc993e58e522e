"""Checks that a source has the tensors of its config. Reads no numbers."""

from collections.abc import Mapping

from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError, TensorSource
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.config import StackConfig, T5GemmaConfig, T5GemmaEncoderConfig


def check_source(config: T5GemmaConfig | T5GemmaEncoderConfig, source: TensorSource) -> list[str]:
    """Compares names, shapes and dtypes of a source with those of a config.

    Args:
        config: a `T5GemmaConfig` or a `T5GemmaEncoderConfig`.
        source: a `TensorSource` under the names of Hugging Face's T5Gemma.

    Returns:
        The names of redundant tensors, which the config does not list and loading ignores.

    Raises:
        CheckpointError: if source and config differ; the message names file, tensor, found and expected.
    """
    for stack in config.stacks:
        check_depth(source, stack, getattr(config, stack))
    return check_tensors(source, {tensor.name: tensor.stored_shape for tensor in tensor_specs(config)}, "T5Gemma")


def check_depth(source: TensorSource, title: str, stack: StackConfig) -> None:
    """Refuses an absurd number of layers, before a table of their tensors would fill the memory.

    Args:
        source: a `TensorSource`.
        title: the stack's name for messages, e.g. "encoder".
        stack: the `StackConfig`.

    Raises:
        CheckpointError: if the source has fewer tensors than layers.
    """
    count = len(source.names())
    if stack.num_layers > count:
        raise CheckpointError(
            f"{source.where()}: the {title} has {stack.num_layers} layers by its config, but there are only {count} "
            f"tensors."
        )


def check_tensors(source: TensorSource, shapes: Mapping[str, tuple[int, ...]], title: str) -> list[str]:
    """Compares names, shapes and dtypes of a source with the expected ones.

    Args:
        source: a `TensorSource`.
        shapes: the expected shape of each tensor, by name.
        title: the expected kind of model for messages, e.g. "T5Gemma".

    Returns:
        The names of redundant tensors, which `shapes` does not list and loading ignores.

    Raises:
        CheckpointError: if they differ; the message names file, tensor, found and expected.
    """
    names = set(source.names())
    if missing := sorted(shapes.keys() - names):
        raise CheckpointError(
            f"{source.where()}: {len(missing)} tensor(s) missing, among them {missing[0]!r}, expected with shape "
            f"{shapes[missing[0]]}."
        )
    surplus = sorted(names - shapes.keys())
    if unknown := [name for name in surplus if not _is_redundant(name)]:
        raise CheckpointError(
            f"{source.where(unknown[0])}: {len(unknown)} tensor(s) that this {title} does not have by its config, "
            f"among them {unknown[0]!r}."
        )
    for name, shape in shapes.items():
        if tuple(source.shape(name)) != shape:
            raise CheckpointError(
                f"{source.where(name)}: tensor {name!r} has shape {tuple(source.shape(name))}. Expected {shape}."
            )
        if source.dtype(name) not in DTYPES.values():
            raise CheckpointError(
                f"{source.where(name)}: tensor {name!r} has dtype {source.dtype(name)}. Expected one of "
                f"{[str(dtype) for dtype in DTYPES.values()]}."
            )
    return surplus


def _is_redundant(name: str) -> bool:
    # A tied output projection equals the decoder's embedding; RoPE's frequencies follow from the config.
    return name in ("lm_head.out_proj.weight", "lm_head.weight") or name.endswith(".rotary_emb.inv_freq")
