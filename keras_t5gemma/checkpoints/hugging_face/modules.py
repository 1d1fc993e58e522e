"""The files by which sentence-transformers reads an encoder's folder with its pooling. Checked with release 6.2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from keras_t5gemma import strict_json
from keras_t5gemma.checkpoints.hugging_face.writer import write_json
from keras_t5gemma.checkpoints.tensor_source import CheckpointError

MODULES_FILE = "modules.json"
# The arguments of a `T5GemmaTextEmbedder` that its folder holds.
OPTIONS = ("pooling", "normalize", "dimensions")
# Our names of pooling and theirs.
_MODES = {"mean": "mean", "last": "lasttoken"}
_TYPES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
# How their `Pooling` was written before release 5: one switch per mode.
_SWITCH = "pooling_mode_"
_SWITCHES = {"mean": "mean_tokens", "lasttoken": "lasttoken"}


def options_of(model: object) -> dict[str, Any] | None:
    """The options of a `T5GemmaTextEmbedder`, or None for other models."""
    return {name: getattr(model, name) for name in OPTIONS} if hasattr(model, "normalize") else None


def write_modules(
    folder: str | os.PathLike[str],
    *,
    pooling: str,
    normalize: bool,
    width: int,
    dimensions: int,
    truncate: str | None = None,
    max_length: int | None = None,
) -> None:
    """Adds sentence-transformers' files to an encoder's folder.

    Vectors are cut by a `Dense` module, a matrix of ones and zeros: sentence-transformers' own `truncate_dim` does not
    normalize them again.

    Args:
        folder: an existing folder with the encoder in Hugging Face's format.
        pooling: "mean" or "last".
        normalize: whether vectors have length 1.
        width: D of the encoder.
        dimensions: the first numbers of a vector that are kept, at most `width`.
        truncate: the end at which a long text is cut, "left" or "right"; None if texts are not cut.
        max_length: the tokens that are left of a long text.
    """
    folder = Path(folder)
    name = "sentence_embedding"
    configs: dict[str, dict[str, Any]] = {
        "Pooling": {"embedding_dimension": width, "pooling_mode": _MODES[pooling], "include_prompt": True}
    }
    if dimensions < width:
        configs["Dense"] = {
            "in_features": width,
            "out_features": dimensions,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
            "module_input_name": name,
            "module_output_name": name,
        }
    if normalize:
        configs["Normalize"] = {"module_input_name": name, "module_output_name": name}
    modules = [{"idx": 0, "name": "0", "path": "", "type": _TYPES["Transformer"]}]
    for i, (kind, config) in enumerate(configs.items(), 1):
        path = f"{i}_{kind}"
        modules.append({"idx": i, "name": str(i), "path": path, "type": _TYPES[kind]})
        (folder / path).mkdir()
        write_json(folder / path / "config.json", config)
        if kind == "Dense":
            save_file(
                {"linear.weight": np.eye(dimensions, width, dtype="float32")}, folder / path / "model.safetensors"
            )
    write_json(folder / MODULES_FILE, modules)
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": text},
            "module_output_name": "token_embeddings",
        },
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": "6.2.0"},
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    if truncate is not None:
        path = folder / "tokenizer_config.json"
        config = strict_json.read_object(path)
        write_json(path, {**config, "model_max_length": max_length, "truncation_side": truncate})


def read_modules(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of an embedder in a folder of sentence-transformers.

    Args:
        folder: a folder, perhaps without such files.

    Returns:
        `pooling`, `normalize` and, if vectors are cut, `dimensions`; an empty dict if there are no such files.

    Raises:
        CheckpointError: if the folder has modules that `T5GemmaTextEmbedder` does not have, or damaged files.
    """
    folder = Path(folder)
    if not (folder / MODULES_FILE).is_file():
        return {}
    try:
        modules = strict_json.parse_object(
            f'{{"modules": {(folder / MODULES_FILE).read_text(encoding="utf-8")}}}', str(folder / MODULES_FILE)
        )["modules"]
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        paths = {kind: folder / Path(str(module["path"])).name for kind, module in zip(kinds, modules, strict=True)}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MODULES_FILE} is not a list of modules ({error}).") from error
    known = [["Transformer", "Pooling"], ["Dense"], ["Normalize"]]
    expected = [kind for group in known for kind in group if kind in kinds]
    if kinds != expected or kinds[:2] != known[0]:
        raise CheckpointError(
            f"{folder / MODULES_FILE} must list Transformer, Pooling and, optionally, Dense and Normalize. Found: "
            f"{', '.join(kinds)}. Load the folder as a T5GemmaEncoder, without its modules."
        )
    options: dict[str, Any] = {"pooling": _pooling(paths["Pooling"]), "normalize": "Normalize" in kinds}
    return {**options, "dimensions": _kept(paths["Dense"])} if "Dense" in kinds else options


def _pooling(folder: Path) -> str:
    """Our name of the pooling in a `Pooling` module's folder."""
    path = folder / "config.json"
    config = _object(path)
    modes = config.get("pooling_mode")
    if modes is None:
        on = [name.removeprefix(_SWITCH) for name, value in config.items() if name.startswith(_SWITCH) and value]
        modes = [mode for mode, switch in _SWITCHES.items() if on == [switch]] or on
    modes = modes if isinstance(modes, list) else [modes]
    found = [ours for ours, theirs in _MODES.items() if modes == [theirs]]
    if not found:
        raise CheckpointError(f"{path}: the pooling must be one of {', '.join(_MODES.values())}. Found: {modes}.")
    return found[0]


def _kept(folder: Path) -> int:
    """The width to which a `Dense` module's folder cuts vectors."""
    config = _object(folder / "config.json")
    file = folder / "model.safetensors"
    try:
        with safe_open(file, "numpy") as tensors:
            names, weight = list(tensors.keys()), tensors.get_tensor("linear.weight")
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error}).") from error
    plain = str(config.get("activation_function")).endswith("Identity") and not config.get("use_residual")
    if not plain or names != ["linear.weight"] or weight.ndim != 2 or not np.array_equal(weight, np.eye(*weight.shape)):
        raise CheckpointError(
            f"{folder}: a T5GemmaTextEmbedder has no projection; only a Dense module that cuts vectors can be read. "
            f"Load the folder as a T5GemmaEncoder, without its modules."
        )
    return int(weight.shape[0])


def _object(path: Path) -> dict:
    try:
        return strict_json.read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
