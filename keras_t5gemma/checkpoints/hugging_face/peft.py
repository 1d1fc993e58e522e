"""Writes and reads LoRA's matrices in the files of Hugging Face's PEFT."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from keras_t5gemma._keras_internals import flatten_layers
from keras_t5gemma.checkpoints.atomic_folder import new_folder
from keras_t5gemma.checkpoints.hugging_face.reader import SafetensorsFile, read_json
from keras_t5gemma.checkpoints.hugging_face.writer import write_json, write_tensors
from keras_t5gemma.checkpoints.processes import gathered, write_on_first
from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource, is_finite
from keras_t5gemma.checkpoints.tensor_table import TensorSpec, tensor_specs
from keras_t5gemma.concurrency import reading

if TYPE_CHECKING:
    import keras

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Options that change the function without a tensor that shows it, or that need more than two matrices.
_UNSUPPORTED = ("use_dora", "use_qalora", "layer_replication", "alora_invocation_tokens", "trainable_token_indices")

Value = TypeVar("Value")


def save_lora(model: keras.Model, folder: str | os.PathLike[str], *, base_model: str | None = None) -> None:
    """Writes a model's LoRA. `peft.PeftModel.from_pretrained(model, folder)` loads it with the same logits.

    For each layer with LoRA of rank r, `adapter_model.safetensors` holds `....lora_A.weight` [r, in] and
    `....lora_B.weight` [out, r], the transposes of Keras's `lora_kernel_a` and `lora_kernel_b`, in float32.
    `adapter_config.json` lists the layers, their ranks and `lora_alpha`. To write the merged model instead, use
    `export_to_hugging_face`. If the weights are sharded over processes, all of them must call this, as with
    `export_to_hugging_face`.

    Args:
        model: a `T5GemmaBackbone`, or a model with one, with LoRA enabled; it may be quantized.
        folder: the path to create. It appears when it is complete; an existing folder is refused.
        base_model: name or path of the base model, which PEFT's `AutoPeftModel` reads.

    Raises:
        ValueError: if the model has no LoRA, or has it on an embedding.
        CheckpointError: if the folder exists, or a number is not finite.
        RuntimeError: if another thread trains the model.
    """
    backbone: Any = getattr(model, "backbone", model)  # A `T5GemmaBackbone`, which this module may not import.
    layers = {module: layer for module, (_, layer) in _modules(backbone).items() if layer.lora_enabled}
    if not layers:
        raise ValueError("The model has no LoRA. Call `backbone.enable_lora(rank)`, and train, first.")
    ranks = {module: int(layer.lora_rank) for module, layer in layers.items()}
    alphas = {module: layer.lora_alpha for module, layer in layers.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _target_modules(layers, _modules(backbone)),
        # PEFT reads the keys as regular expressions, so dots in names are escaped.
        "rank_pattern": {re.escape(module): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(module): value for module, value in alphas.items() if value != alpha},
    }

    def write(source: TensorSource) -> None:
        with new_folder(folder) as partial:
            write_json(partial / CONFIG_FILE, config)
            # One shard, because PEFT reads only one file.
            write_tensors(partial, source, 2**62, title=f"Writing {Path(folder).name}")
            (partial / "model.safetensors").rename(partial / WEIGHTS_FILE)

    matrices = _LoraTensors(backbone, layers)
    with reading(model, "save_lora"):
        write_on_first(matrices, matrices.variables(), write)


def load_lora(model: keras.Model, folder: str | os.PathLike[str]) -> None:
    """Loads LoRA that `save_lora` wrote or PEFT trained. Enables it first, if the model has none.

    Everything is compared before anything is changed. If LoRA is enabled here, all other weights are frozen, as by
    `enable_lora`; an optimizer that was built for the old weights needs a new `compile`.

    Args:
        model: a `T5GemmaBackbone`, or a model with one. It is the model that the adapter was trained on, without
            LoRA or with LoRA of the same ranks on the same layers.
        folder: a folder with `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        CheckpointError: if the files are damaged or do not belong to this model, or hold something that Keras's LoRA
            does not support: other PEFT methods, DoRA, trained biases or embeddings.
        ValueError: if the model has LoRA on other layers or of another rank.
    """
    backbone: Any = getattr(model, "backbone", model)  # A `T5GemmaBackbone`, which this module may not import.
    folder = Path(folder)
    modules = _modules(backbone)
    config = _read_config(folder / CONFIG_FILE)
    file = SafetensorsFile(folder / WEIGHTS_FILE)
    ranks = _read_ranks(file, modules, config)
    enabled = {module for module, (_, layer) in modules.items() if layer.lora_enabled}
    if enabled:
        for module in sorted(enabled ^ ranks.keys()):
            owner, other = ("model", "adapter") if module in enabled else ("adapter", "model")
            raise ValueError(f"The {owner} has LoRA on {module}, the {other} does not: {folder}.")
        for module, rank in ranks.items():
            if modules[module][1].lora_rank != rank:
                raise ValueError(
                    f"{folder}: LoRA on {module} has rank {rank}, in the model {modules[module][1].lora_rank}."
                )
    matrices = {
        module: (_read_matrix(file, _PREFIX + module + _A).T, _read_matrix(file, _PREFIX + module + _B).T)
        for module in ranks
    }
    alphas = {module: _lora_alpha(config, module, rank) for module, rank in ranks.items()}
    if not enabled:
        backbone.enable_lora_on({modules[module][1].path: (rank, alphas[module]) for module, rank in ranks.items()})
    for module, (a, b) in matrices.items():
        layer = modules[module][1]
        layer.lora_kernel_a.assign(a)
        layer.lora_kernel_b.assign(b)
        layer.lora_alpha = alphas[module]


class _LoraTensors(TensorSource):
    """The LoRA matrices of layers, which are given by module name, under PEFT's names and in PEFT's layout."""

    def __init__(self, backbone: keras.Model, layers: Mapping[str, Any]):
        self._title = f"the model {backbone.name!r}"
        self._variables = {}
        for module, layer in layers.items():
            self._variables[_PREFIX + module + _A] = layer.lora_kernel_a
            self._variables[_PREFIX + module + _B] = layer.lora_kernel_b

    def variables(self) -> list[keras.Variable]:
        return list(self._variables.values())

    def names(self) -> list[str]:
        return list(self._variables)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._variables[name].shape)[::-1]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._variables[name].dtype)

    def read(self, name: str) -> np.ndarray:
        return gathered(self._variables[name]).T

    def where(self, name: str | None = None) -> str:
        return self._title if name is None else f"{self._title} ({self._variables[name].path})"


def _modules(backbone: Any) -> dict[str, tuple[TensorSpec, Any]]:
    """(tensor, layer) of each matrix that can have LoRA, by the name of Hugging Face's module.

    Raises:
        ValueError: if LoRA is on an embedding.
    """
    layers, modules = {layer.path: layer for layer in flatten_layers(backbone)}, {}
    for tensor in tensor_specs(backbone.config):
        path, _, weight = tensor.path.rpartition("/")
        if weight == "kernel":
            modules[tensor.name.removesuffix(".weight")] = (tensor, layers[path])
        elif getattr(layers[path], "lora_enabled", False):
            raise ValueError(
                f"{path} has LoRA, which an adapter of PEFT cannot hold: Keras adds it to the table and so to the tied "
                f"output projection, PEFT only to the rows looked up. Use `export_to_hugging_face`, which merges it."
            )
    return modules


def _most_common(values: Mapping[str, Value]) -> Value:
    return Counter(values.values()).most_common(1)[0][0]


def _target_modules(layers: Collection[str], modules: Iterable[str]) -> list[str]:
    """The value of `target_modules`, as PEFT writes it: a name's last part, if all modules that end with it have LoRA.

    Args:
        layers: names of the modules with LoRA.
        modules: names of all modules that can have LoRA.
    """
    by_part: dict[str, list[str]] = {}
    for module in modules:
        by_part.setdefault(module.rpartition(".")[2], []).append(module)
    short = [part for part, members in by_part.items() if all(module in layers for module in members)]
    return short + [module for module in layers if module.rpartition(".")[2] not in short]


def _read_config(path: Path) -> dict[str, Any]:
    """Reads the adapter's config, and refuses it if it has options that Keras's LoRA does not support."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: the adapter's `peft_type` is {config.get('peft_type')!r}. Expected 'LORA'.")
    if unsupported := [name for name in _UNSUPPORTED if config.get(name)]:
        name = unsupported[0]
        raise CheckpointError(f"{path}: Keras's LoRA does not support {name}={config[name]!r:.100}.")
    for name, patterns, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", (int, float))):
        values = config[patterns] = config.get(patterns) or {}
        if not isinstance(values, dict) or not all(_is_positive(x, kind) for x in (config.get(name), *values.values())):
            raise CheckpointError(
                f"{path}: `{name}` and `{patterns}` must hold positive numbers. Found: {config.get(name)!r:.100} and "
                f"{values!r:.100}."
            )
    return config


def _is_positive(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _read_ranks(
    file: SafetensorsFile, modules: Mapping[str, tuple[TensorSpec, Any]], config: Mapping[str, Any]
) -> dict[str, int]:
    """The LoRA rank of each module in an adapter, after its names and shapes were compared with model and config.

    Args:
        file: the adapter's weights.
        modules: (tensor, layer) of each matrix that can have LoRA, by module name.
        config: the adapter's config.

    Raises:
        CheckpointError: if the adapter does not fit.
    """
    halves: dict[str, set[str]] = {}
    for name in file.tensors:
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None or match[1] not in modules:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} is not LoRA on a matrix of this model, such as "
                f"{_PREFIX + next(iter(modules)) + _A!r}."
            )
        halves.setdefault(match[1], set()).add(match[2])
    if not halves:
        raise CheckpointError(f"{file.path} holds no tensors.")
    ranks = {module: _pattern_value(config, "rank_pattern", "r", module) for module in halves}
    for module, rank in ranks.items():
        fan_in, fan_out = modules[module][0].shape
        for suffix, shape in ((_A, (rank, fan_in)), (_B, (fan_out, rank))):
            name = _PREFIX + module + suffix
            if name not in file.tensors:
                raise CheckpointError(f"{file.path} has no tensor {name!r}, the other half of its product.")
            if tuple(file.tensors[name].shape) != shape:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} has shape {tuple(file.tensors[name].shape)}. Expected {shape}."
                )
    return ranks


def _pattern_value(config: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    """The value that PEFT uses for a module: that of the first pattern that matches its name or the name's end.

    Args:
        config: the adapter's config.
        patterns: key of the values by pattern, "rank_pattern" or "alpha_pattern".
        default: key of the value for other modules, "r" or "lora_alpha".
        module: the module's name.
    """
    for pattern, value in config[patterns].items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"The adapter's `{patterns}` has {pattern!r}: not a regular expression.") from error
    return config[default]


def _lora_alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The module's `lora_alpha` for Keras, which divides it by the rank; rsLoRA divides by the rank's square root."""
    alpha = _pattern_value(config, "alpha_pattern", "lora_alpha", module)
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _read_matrix(file: SafetensorsFile, name: str) -> np.ndarray:
    """Reads one matrix as float32, and refuses infinities and NaNs."""
    array = file.read(name)
    if not is_finite(array.reshape(-1)):
        raise CheckpointError(f"{file.path}: tensor {name!r} holds infinities or NaNs.")
    return array.astype("float32", copy=False)
