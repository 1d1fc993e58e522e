"""LoRA's matrices in the files of Hugging Face's PEFT, written and read."""

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from keras_t5gemma._keras_internals import flatten_layers
from keras_t5gemma.checkpoints.atomic_folder import new_folder
from keras_t5gemma.checkpoints.hugging_face.reader import SafetensorsFile, read_json
from keras_t5gemma.checkpoints.hugging_face.writer import write_json, write_tensors
from keras_t5gemma.checkpoints.processes import gathered, write_on_first
from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource, is_finite
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.concurrency import reading

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# What changes the function without a tensor of its own to show it, or needs more than two matrices.
_UNKNOWN = ("use_dora", "use_qalora", "layer_replication", "alora_invocation_tokens", "trainable_token_indices")


def save_lora(model, folder, *, base_model=None):
    """Writes a model's LoRA as `peft.PeftModel.from_pretrained(model, folder)` loads it, with the same logits.

    `adapter_model.safetensors` holds, for a layer with LoRA of rank r, `....lora_A.weight` [r, in] and
    `....lora_B.weight` [out, r], the transposes of Keras's `lora_kernel_a` and `lora_kernel_b`, in float32;
    `adapter_config.json` says which layers, their rank and `lora_alpha`. To have the merged model instead, use
    `export_to_hugging_face`; as there, all processes on which the weights lie call this.

    Args:
        model: a `T5GemmaBackbone`, or a model with one, with LoRA enabled; it may be quantized.
        folder: the path to create. It appears when it is complete; an existing one is refused.
        base_model: name or path of the model that the adapter is for, which PEFT's `AutoPeftModel` reads.

    Raises:
        ValueError: where the model has no LoRA, or has it on an embedding.
        CheckpointError: where the folder exists, or a number is not finite.
        RuntimeError: if another thread trains the model.
    """
    backbone = getattr(model, "backbone", model)
    layers = {module: layer for module, (_, layer) in _modules(backbone).items() if layer.lora_enabled}
    if not layers:
        raise ValueError("The model has no LoRA. Call `backbone.enable_lora(rank)`, and train, first.")
    ranks = {module: int(layer.lora_rank) for module, layer in layers.items()}
    alphas = {module: layer.lora_alpha for module, layer in layers.items()}
    rank, alpha = _usual(ranks), _usual(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(layers, _modules(backbone)),
        # Dots in names are regular expressions for PEFT, too.
        "rank_pattern": {re.escape(module): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(module): value for module, value in alphas.items() if value != alpha},
    }

    def write(source):
        with new_folder(folder) as partial:
            write_json(partial / CONFIG_FILE, config)
            # PEFT reads one file.
            write_tensors(partial, source, 2**62, title=f"Writing {Path(folder).name}")
            (partial / "model.safetensors").rename(partial / WEIGHTS_FILE)

    matrices = _Matrices(backbone, layers)
    with reading(model, "save_lora"):
        write_on_first(matrices, matrices.variables(), write)


def load_lora(model, folder):
    """Reads LoRA that `save_lora` wrote or PEFT trained, and enables it where the model has none yet.

    Everything is compared before anything is changed. Where LoRA is enabled here, all other weights are frozen, as by
    `enable_lora`; an optimizer that knows the old weights wants `compile` anew.

    Args:
        model: a `T5GemmaBackbone`, or a model with one: the one that the adapter was trained on, without LoRA, or with
            LoRA of the same ranks on the same layers.
        folder: with `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        CheckpointError: where the files are damaged or do not belong to this model, or hold what Keras's LoRA has not:
            other PEFT methods, DoRA, trained biases or embeddings.
        ValueError: where the model has LoRA on other layers or of another rank.
    """
    backbone = getattr(model, "backbone", model)
    folder = Path(folder)
    modules = _modules(backbone)
    config = _checked_config(folder / CONFIG_FILE)
    file = SafetensorsFile(folder / WEIGHTS_FILE)
    ranks = _checked_ranks(file, modules, config)
    enabled = {module for module, (_, layer) in modules.items() if layer.lora_enabled}
    if enabled:
        for module in sorted(enabled ^ ranks.keys()):
            has, misses = ("model", "adapter") if module in enabled else ("adapter", "model")
            raise ValueError(f"The {has} has LoRA on {module}, the {misses} has not: {folder}.")
        for module, rank in ranks.items():
            if modules[module][1].lora_rank != rank:
                raise ValueError(
                    f"{folder}: LoRA on {module} has rank {rank}, in the model {modules[module][1].lora_rank}."
                )
    matrices = {
        module: (_read(file, _PREFIX + module + _A).T, _read(file, _PREFIX + module + _B).T) for module in ranks
    }
    alphas = {module: _alpha(config, module, rank) for module, rank in ranks.items()}
    if not enabled:
        backbone.enable_lora_on({modules[module][1].path: (rank, alphas[module]) for module, rank in ranks.items()})
    for module, (a, b) in matrices.items():
        layer = modules[module][1]
        layer.lora_kernel_a.assign(a)
        layer.lora_kernel_b.assign(b)
        layer.lora_alpha = alphas[module]


class _Matrices(TensorSource):
    """The LoRA matrices of layers by module name, under PEFT's names and in its layout."""

    def __init__(self, backbone, layers):
        self._title = f"the model {backbone.name!r}"
        self._variables = {}
        for module, layer in layers.items():
            self._variables[_PREFIX + module + _A] = layer.lora_kernel_a
            self._variables[_PREFIX + module + _B] = layer.lora_kernel_b

    def variables(self):
        return list(self._variables.values())

    def names(self):
        return list(self._variables)

    def shape(self, name):
        return tuple(self._variables[name].shape)[::-1]

    def dtype(self, name):
        return np.dtype(self._variables[name].dtype)

    def read(self, name):
        return gathered(self._variables[name]).T

    def where(self, name=None):
        return self._title if name is None else f"{self._title} ({self._variables[name].path})"


def _modules(backbone):
    """`(tensor, layer)` of each matrix that LoRA may be on, by the name of Hugging Face's module.

    Raises:
        ValueError: where LoRA is on an embedding.
    """
    layers, modules = {layer.path: layer for layer in flatten_layers(backbone)}, {}
    for tensor in tensor_specs(backbone.config):
        path, _, weight = tensor.path.rpartition("/")
        if weight == "kernel":
            modules[tensor.name.removesuffix(".weight")] = (tensor, layers[path])
        elif getattr(layers[path], "lora_enabled", False):
            raise ValueError(
                f"{path} has LoRA, which no adapter of PEFT's can hold: Keras adds it to the table and so to the tied "
                f"output projection, PEFT to what is looked up alone. Use `export_to_hugging_face`, which merges it."
            )
    return modules


def _usual(values):
    return Counter(values.values()).most_common(1)[0][0]


def _targets(layers, modules):
    """Names for `target_modules`: as PEFT does, the last part alone where it means exactly these layers."""
    of_part = {}
    for module in modules:
        of_part.setdefault(module.rpartition(".")[2], []).append(module)
    short = [part for part, members in of_part.items() if all(module in layers for module in members)]
    return short + [module for module in layers if module.rpartition(".")[2] not in short]


def _checked_config(path):
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: the adapter's `peft_type` is {config.get('peft_type')!r}. Expected 'LORA'.")
    if unknown := [name for name in _UNKNOWN if config.get(name)]:
        raise CheckpointError(f"{path}: {unknown[0]}={config[unknown[0]]!r:.100} is nothing that Keras's LoRA can do.")
    for name, patterns, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", (int, float))):
        values = config[patterns] = config.get(patterns) or {}
        if not isinstance(values, dict) or not all(_is_positive(x, kind) for x in (config.get(name), *values.values())):
            raise CheckpointError(
                f"{path}: `{name}` and `{patterns}` must hold positive numbers. Found: {config.get(name)!r:.100} and "
                f"{values!r:.100}."
            )
    return config


def _is_positive(value, kind):
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _checked_ranks(file, modules, config):
    """The rank on each module, once names and shapes are those of the model and of the adapter's config."""
    found = {}
    for name in file.tensors:
        module = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if module is None or module[1] not in modules:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} is not LoRA on a matrix of this model, such as "
                f"{_PREFIX + next(iter(modules)) + _A!r}."
            )
        found.setdefault(module[1], set()).add(module[2])
    if not found:
        raise CheckpointError(f"{file.path} holds no tensors.")
    ranks = {module: _value(config, "rank_pattern", "r", module) for module in found}
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


def _value(config, patterns, usual, module):
    """What PEFT takes for a module: the first pattern that is its name or the end of it, else the usual value."""
    for pattern, value in config[patterns].items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"The adapter's `{patterns}` has {pattern!r}, no regular expression.") from error
    return config[usual]


def _alpha(config, module, rank):
    """Keras's `lora_alpha`, which it divides by the rank."""
    alpha = _value(config, "alpha_pattern", "lora_alpha", module)
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _read(file, name):
    array = file.read(name)
    if not is_finite(array.reshape(-1)):
        raise CheckpointError(f"{file.path}: tensor {name!r} holds infinities or NaNs.")
    return array.astype("float32", copy=False)
