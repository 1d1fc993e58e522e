"""The part of a backbone's config beside its architecture: quantization, LoRA, and frozen weights.

keras-hub's config stores only the dtype policies of the layers. Its loader drops them for a backbone without its task.
They name neither a layer's quantizers nor its LoRA.
"""

import contextlib
import json
from collections.abc import Callable, Mapping

import keras

from keras_t5gemma._keras_internals import flatten_layers
from keras_t5gemma.layers import lora
from keras_t5gemma.layers.saved_variables import quantized_layers

KEYS = ("quantization", "lora", "trainable_weights")


def state_config(backbone: keras.Model) -> dict:
    """The part of a backbone's config that describes how its weights are stored and which are trained.

    Args:
        backbone: a `T5GemmaBackbone`.

    Returns:
        A JSON-ready dict with `dtype` in keras-hub's form. If the model differs from a new one, also `quantization`
        with the dtype before quantization and the layers of each mode; `lora` with rank and alpha per layer, and the
        weights that were trainable before LoRA; `trainable_weights` by path.
    """
    config = {"dtype": keras.dtype_policies.serialize(backbone.dtype_policy)}
    quantized = {layer.path: layer for layer in flatten_layers(backbone) if layer.quantization_mode is not None}
    if quantized:
        source = backbone.dtype_policy.name
        groups, policies = {}, {}
        for path, layer in quantized.items():
            mode = _mode(layer.dtype_policy)
            # A new policy: Keras loses the names of policies that it writes into a map.
            policies[path] = keras.dtype_policies.get(f"{mode}_from_{source}")
            options = keras.saving.serialize_keras_object(layer.quantization_config)
            group = groups.setdefault(json.dumps((mode, options), sort_keys=True, default=str), (mode, options, []))
            group[2].append(path)
        config["dtype"] = keras.dtype_policies.serialize(
            keras.dtype_policies.DTypePolicyMap(default_policy=source, policy_map=policies)
        )
        config["quantization"] = {
            "dtype": source,
            "groups": [{"mode": mode, "config": options, "layers": paths} for mode, options, paths in groups.values()],
        }
    adapted = lora.lora_layers(backbone)
    if adapted:
        config["lora"] = {
            "layers": {path: [layer.lora_rank, layer.lora_alpha] for path, layer in adapted.items()},
            "trainable_before": backbone.trainable_before_lora,
        }
    trainable = lora.trainable_paths(backbone)
    if trainable != _usually_trainable(backbone, quantized, adapted):
        config["trainable_weights"] = trainable
    return config


def backbone_from_config(config: Mapping, make: Callable[[dict], keras.Model]) -> keras.Model:
    """Creates a backbone as `state_config` described it, with new weights for a file to fill.

    Args:
        config: the whole config. keras-hub's loaders may have replaced its `dtype` by another one or by None.
        make: creates the backbone from the config without `KEYS`.

    Returns:
        A `T5GemmaBackbone`.

    Raises:
        ValueError: if the config is quantized and its `dtype` was replaced by a policy with another quantization.
    """
    config, state = dict(config), {name: config[name] for name in KEYS if name in config}
    for name in state:
        del config[name]
    dtype = config.get("dtype")
    dtype = keras.dtype_policies.get(dtype) if isinstance(dtype, dict) else dtype
    context = contextlib.nullcontext()
    if quantization := state.get("quantization"):
        dtype = _source(dtype, quantization)
        context = quantized_layers(_policies(quantization, keras.dtype_policies.get(dtype).name))
    if dtype is not None:
        config["dtype"] = dtype
    with context:
        backbone = make(config)
    if saved := state.get("lora"):
        lora.enable(backbone, {path: tuple(values) for path, values in saved["layers"].items()})
        backbone.trainable_before_lora = saved["trainable_before"]
    if not config.get("trainable", True):
        lora.set_trainable(backbone, [])  # again, whatever was saved: enabling LoRA has changed it
    elif "trainable_weights" in state:
        lora.set_trainable(backbone, state["trainable_weights"])
    return backbone


def _mode(policy: keras.DTypePolicy) -> str:
    """The mode of a quantized policy with its block size, e.g. "int4/128"; its name begins with it."""
    return policy.get_config()["mode"]


def _source(dtype: str | keras.DTypePolicy | None, quantization: Mapping) -> str | keras.DTypePolicy:
    """The policy to build in, from the config's `dtype` and its `quantization` entry."""
    policy = None if dtype is None else keras.dtype_policies.get(dtype)
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy.default_policy
    mode = getattr(policy, "quantization_mode", None)
    if mode is None:
        return quantization["dtype"] if policy is None else policy
    modes = [group["mode"] for group in quantization["groups"]]
    if any(_mode(policy) not in (saved, saved.partition("/")[0]) for saved in modes):
        raise ValueError(
            f"`dtype` asks for {_mode(policy)}, but the saved model is quantized already, in {', '.join(modes)}. Leave "
            f"`dtype` out, or load the model from before `quantize`."
        )
    return policy.name.partition("_from_")[2]


def _policies(quantization: Mapping, source: str) -> dict[str, tuple]:
    """`{path: (policy, config)}` of the quantized layers."""
    return {
        path: (
            keras.dtype_policies.get(f"{group['mode']}_from_{source}"),
            keras.saving.deserialize_keras_object(group["config"]),
        )
        for group in quantization["groups"]
        for path in group["layers"]
    }


def _usually_trainable(backbone: keras.Model, quantized: Mapping, adapted: Mapping) -> list[str]:
    """The paths of the weights that training changes if the user has not changed `trainable`."""
    if adapted:
        return [v.path for v in backbone.weights if v.path.rpartition("/")[2].startswith("lora_")]
    return [v.path for v in backbone.weights if v.path.rpartition("/")[0] not in quantized]
