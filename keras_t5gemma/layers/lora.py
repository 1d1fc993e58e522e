"""LoRA (arXiv 2106.09685): chooses layers and ranks, and merges LoRA into the weights."""

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence

import keras
from keras import ops

from keras_t5gemma._keras_internals import flatten_layers, remove_variable
from keras_t5gemma.checks import integer


def lora_layers(backbone: keras.Model) -> dict[str, keras.layers.Layer]:
    """The layers with LoRA by path, in the model's order."""
    layers = _candidates(backbone)
    return {path: layer for path, layer in layers.items() if layer.lora_enabled}


def select(backbone: keras.Model, rank: int | Mapping[str, int], targets: str | Sequence[str] | None) -> dict[str, int]:
    """Selects the layers that match targets, each with its rank.

    Args:
        backbone: a `T5GemmaBackbone`.
        rank: a positive integer for all targets, or `{target: rank}`. The first target that matches a layer gives its
            rank.
        targets: one target or several; None with a dict of ranks. A target is a layer's name ("query"), its path, or a
            pattern of paths as in `fnmatch` ("decoder/*/cross_attention/*"), which matches no embedding.

    Returns:
        `{path: rank}`, in the model's order.

    Raises:
        ValueError: if a rank is not a positive integer, or a target matches nothing; the message lists the layers.
    """
    if isinstance(rank, dict):
        if targets is not None:
            raise ValueError(
                "`rank` is a dict of targets and their ranks, so `target_layer_names` must be left out. Received: "
                f"target_layer_names={targets!r}."
            )
        ranks = {target: integer(value, f"rank[{target!r}]") for target, value in rank.items()}
    else:
        targets = [targets] if isinstance(targets, str) else list(targets)
        ranks = dict.fromkeys(targets, integer(rank, "rank"))
    layers, selected = _candidates(backbone), {}
    for target, value in ranks.items():
        matched = [path for path, layer in layers.items() if _matches(target, path, layer)]
        if not matched:
            raise ValueError(f"`enable_lora`: {target!r} matches no layer. {_describe(layers)}")
        if not (remaining := [path for path in matched if path not in selected]):
            raise ValueError(
                f"`enable_lora`: each layer that {target!r} matches was matched by an earlier target of {list(ranks)}, "
                f"which counts. Put {target!r} before it."
            )
        selected |= dict.fromkeys(remaining, value)
    if not selected:
        raise ValueError(f"`enable_lora`: no targets were given. {_describe(layers)}")
    return {path: selected[path] for path in layers if path in selected}


def enable(backbone: keras.Model, layers: Mapping[str, tuple[int, float | None]]) -> list[str]:
    """Adds LoRA to layers and freezes everything else.

    Args:
        backbone: a `T5GemmaBackbone` without LoRA.
        layers: `{path: (rank, alpha)}`. If alpha is None, it equals the rank.

    Returns:
        The paths of the weights that were trainable before.

    Raises:
        ValueError: if the model already has LoRA.
    """
    if present := lora_layers(backbone):
        raise ValueError(
            f"The model has LoRA already, on {next(iter(present))} and {len(present) - 1} more layers. Call "
            f"`merge_lora()` first, which adds LoRA's products to the weights."
        )
    trainable_before = trainable_paths(backbone)
    candidates = _candidates(backbone)
    for path, (rank, alpha) in layers.items():
        candidates[path].trainable = True  # otherwise its new matrices would be frozen
        candidates[path].enable_lora(rank, lora_alpha=alpha)
    matrices = [getattr(candidates[path], name).path for path in layers for name in candidates[path].lora_names]
    set_trainable(backbone, matrices)
    return trainable_before


def merge(backbone: keras.Model) -> None:
    """Adds LoRA's products to their weights, and removes LoRA. Frozen weights stay frozen.

    Raises:
        ValueError: if the model has no LoRA, or has it on quantized weights, which cannot store the sum.
    """
    layers = lora_layers(backbone)
    if not layers:
        raise ValueError("The model has no LoRA to merge. `enable_lora(rank)` adds it.")
    quantized = [path for path, layer in layers.items() if layer.quantization_mode is not None]
    if quantized:
        raise ValueError(
            f"LoRA on {quantized[0]} cannot be merged: its weights are quantized, and rounding the sum to "
            f"{layers[quantized[0]].quantization_mode} would change the model. Keep LoRA as it is, or write it with "
            f"`save_lora`, `load_lora` it into the model from before `quantize`, and merge it there."
        )
    for layer in layers.values():
        name = "kernel" if isinstance(layer, keras.layers.Dense) else "embeddings"
        variable = getattr(layer, f"_{name}")
        # The sum is in the variable's dtype. In mixed precision the layer's own sum would be in the compute dtype.
        a, b = (getattr(layer, lora) for lora in layer.lora_names)
        product = ops.matmul(a.value, b.value) * (layer.lora_alpha / layer.lora_rank)
        variable.assign(ops.cast(ops.cast(variable.value, "float32") + product, variable.dtype))
        layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
        for lora in layer.lora_names:
            remove_variable(layer, lora)


@contextlib.contextmanager
def without_lora(backbone: keras.Model) -> Iterator[None]:
    """A context in which the layers compute without their LoRA, as before `enable_lora`. Its matrices stay."""
    layers = list(lora_layers(backbone).values())
    try:
        for layer in layers:
            layer.lora_enabled = False
        yield
    finally:
        for layer in layers:
            layer.lora_enabled = True


def trainable_paths(backbone: keras.Model) -> list[str]:
    """The paths of the weights that a training step changes."""
    return [variable.path for variable in backbone.trainable_weights]


def set_trainable(backbone: keras.Model, paths: Iterable[str]) -> None:
    """Makes exactly these weights trainable, and sets `trainable` of their layers accordingly."""
    paths = set(paths)
    # Each layer and each variable: on TensorFlow, a layer passes on only a changed `trainable` to its parts.
    for layer in flatten_layers(backbone):
        layer.trainable = not layer.weights or any(variable.path in paths for variable in layer.weights)
    for variable in backbone.weights:
        variable.trainable = variable.path in paths


def _candidates(backbone: keras.Model) -> dict[str, keras.layers.Layer]:
    """The layers that support LoRA, by path."""
    return {layer.path: layer for layer in flatten_layers(backbone) if getattr(layer, "lora_names", ())}


def _matches(target: str, path: str, layer: keras.layers.Layer) -> bool:
    """Whether a target of `select` names a layer."""
    if target in (layer.name, path):
        return True
    # Patterns match no embedding table: PEFT's adapters never have LoRA on one.
    return isinstance(layer, keras.layers.Dense) and fnmatch.fnmatchcase(path, target)


def _describe(layers: Mapping[str, keras.layers.Layer]) -> str:
    """The end of an error message: which layers there are."""
    names = sorted({layer.name for layer in layers.values()})
    # The last layer inside a block of each stack, as an example; an encoder alone has no decoder.
    inside = [[path for path in layers if path.startswith(f"{name}/layer_")] for name in ("decoder", "encoder")]
    examples = " and ".join(repr(paths[-1]) for paths in inside if paths)
    pattern = "decoder/*/cross_attention/*" if inside[0] else "encoder/*/self_attention/*"
    return (
        f"Layers are named {', '.join(names)}, and have paths such as {examples}, which patterns such as {pattern!r} "
        f"match."
    )
