"""LoRA (arXiv 2106.09685): chooses layers and ranks, and merges LoRA into the weights."""

import fnmatch

import keras
from keras import ops

from keras_t5gemma._keras_internals import flatten_layers, remove_variable
from keras_t5gemma.checks import integer


def lora_layers(backbone):
    """The layers with LoRA by path, in the model's order."""
    layers = _candidates(backbone)
    return {path: layer for path, layer in layers.items() if layer.lora_enabled}


def select(backbone, rank, targets):
    """The layers that LoRA is asked for.

    Args:
        backbone: a `T5GemmaBackbone`.
        rank: a positive integer for all targets, or `{target: rank}`, of which the first that matches a layer counts.
        targets: a sequence of targets, or None with a dict of ranks. A target is a layer's name ("query"), its path, or
            a pattern of paths as in `fnmatch` ("decoder/*/cross_attention/*"), which matches no embedding.

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
    layers, chosen = _candidates(backbone), {}
    for target, value in ranks.items():
        matched = [path for path, layer in layers.items() if _matches(target, path, layer)]
        if not matched:
            raise ValueError(f"`enable_lora`: {target!r} matches no layer. {_describe(layers)}")
        if not (left := [path for path in matched if path not in chosen]):
            raise ValueError(
                f"`enable_lora`: each layer that {target!r} matches was matched by an earlier target of {list(ranks)}, "
                f"which counts. Put {target!r} before it."
            )
        chosen |= dict.fromkeys(left, value)
    if not chosen:
        raise ValueError(f"`enable_lora`: no targets were given. {_describe(layers)}")
    return {path: chosen[path] for path in layers if path in chosen}


def enable(backbone, layers):
    """Adds LoRA to layers and freezes everything else.

    Args:
        backbone: a `T5GemmaBackbone` without LoRA.
        layers: `{path: (rank, alpha)}`; alpha None for the rank.

    Returns:
        The paths of the weights that were trainable before.

    Raises:
        ValueError: if the model has LoRA already.
    """
    if present := lora_layers(backbone):
        raise ValueError(
            f"The model has LoRA already, on {next(iter(present))} and {len(present) - 1} more layers. Call "
            f"`merge_lora()` first, to add what it has learned to the weights."
        )
    before = trainable_paths(backbone)
    candidates = _candidates(backbone)
    for path, (rank, alpha) in layers.items():
        candidates[path].trainable = True  # or its new matrices would be frozen
        candidates[path].enable_lora(rank, lora_alpha=alpha)
    matrices = [getattr(candidates[path], name).path for path in layers for name in candidates[path].lora_names]
    set_trainable(backbone, matrices)
    return before


def merge(backbone):
    """Adds LoRA's products to the weights they belong to, and removes LoRA; what is frozen stays frozen.

    Raises:
        ValueError: if there is no LoRA, or it lies on quantized weights, which cannot hold the sum.
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
        # In the variable's dtype: in mixed precision the layer's own sum is in the compute dtype.
        a, b = (getattr(layer, lora) for lora in layer.lora_names)
        product = ops.matmul(a.value, b.value) * (layer.lora_alpha / layer.lora_rank)
        variable.assign(ops.cast(ops.cast(variable.value, "float32") + product, variable.dtype))
        layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
        for lora in layer.lora_names:
            remove_variable(layer, lora)


def trainable_paths(backbone):
    """The paths of the weights that a training step changes."""
    return [variable.path for variable in backbone.trainable_weights]


def set_trainable(backbone, paths):
    """Makes these weights trainable, and no others, with what that means for the layers they are in."""
    paths = set(paths)
    # Layer by layer, and each variable: on TensorFlow, setting a layer to what it is already reaches nothing inside it.
    for layer in flatten_layers(backbone):
        layer.trainable = not layer.weights or any(variable.path in paths for variable in layer.weights)
    for variable in backbone.weights:
        variable.trainable = variable.path in paths


def _candidates(backbone):
    """The layers that LoRA may be on, by path."""
    return {layer.path: layer for layer in flatten_layers(backbone) if getattr(layer, "lora_names", ())}


def _matches(target, path, layer):
    if target in (layer.name, path):
        return True
    # A table of embeddings counts only by its name: no adapter of PEFT's holds LoRA on it.
    return isinstance(layer, keras.layers.Dense) and fnmatch.fnmatchcase(path, target)


def _describe(layers):
    names = sorted({layer.name for layer in layers.values()})
    return (
        f"Layers are named {', '.join(names)}, and have paths such as {_last(layers, 'decoder')!r} and "
        f"{_last(layers, 'encoder')!r}, which patterns such as 'decoder/*/cross_attention/*' match."
    )


def _last(layers, stack):
    return [path for path in layers if path.startswith(f"{stack}/") and "layer_" in path][-1]
