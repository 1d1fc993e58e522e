"""`export` in the formats of other runtimes: options are checked before the model is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from keras_t5gemma.cli.options import Format
from keras_t5gemma.cli.session import Backend, load_model, remove_empty

# Format -> the options that it reads, of those in `_OPTIONS`.
_READ = {
    Format.hf: ("--part", "--dtype", "--max-shard-size", "--allow-non-finite"),
    Format.keras: ("--part", "--dtype", "--max-shard-size", "--allow-non-finite", "--backend"),
    Format.onnx: ("--backend",),
    Format.ctranslate2: ("--quantization", "--backend"),
    Format.saved_model: ("--input-length", "--max-length", "--no-strings", "--dtype", "--backend"),
}
# What to say besides that a format does not read an option.
_REMEDIES = {
    ("--dtype", Format.ctranslate2): " Use --quantization.",
    ("--dtype", Format.onnx): " ONNX files have float32.",
    ("--part", Format.onnx): " An encoder or embedder: `kt.export_onnx(kt.T5GemmaEncoder.from_preset(MODEL), OUT)`.",
}


def check_options(format: Format, options: dict[str, Any]) -> None:
    """Refuses options that the user set and the format does not read.

    Args:
        format: the format.
        options: `{option: value}`; None or False for an option that is not set.

    Raises:
        ValueError: if there is one; the message names it and the formats that read it.
    """
    for name, value in options.items():
        if value in (None, False) or name in _READ[format]:
            continue
        formats = ", ".join(other for other, read in _READ.items() if name in read)
        remedy = _REMEDIES.get((name, format), "")
        raise ValueError(f"{name} has no effect with --format {format}. It is for --format {formats}.{remedy}")


def check_runtime(format: Format, backend: Backend | None, quantization: str | None) -> None:
    """Checks what an export needs besides the model, before the model is loaded.

    Raises:
        ValueError: if the backend or the quantization does not suit the format.
        ImportError: if the format's library is not installed.
    """
    if format == Format.saved_model:
        name = backend or os.environ.get("KERAS_BACKEND")
        if name == Backend.torch:
            raise ValueError(
                "--format saved_model needs the JAX or the TensorFlow backend. Received: torch. Pass --backend "
                "tensorflow or --backend jax; the checkpoint is the same."
            )
        return
    from keras_t5gemma.exports.libraries import QUANTIZATIONS, imported
    from keras_t5gemma.suggestions import check_choice

    if quantization is not None:
        check_choice(quantization, "--quantization", QUANTIZATIONS)
    imported(str(format), f"--format {format}", str(format))


def export_to_runtime(
    format: Format, model: str, out: Path, *, dtype: Any, backend: Backend | None, options: dict[str, Any]
) -> None:
    """Loads a model and writes it.

    Args:
        format: the format.
        model: an argument of `from_preset`.
        out: the folder to create.
        dtype: of the model, or None.
        backend: a `Backend`, or None.
        options: keyword arguments of the format's function; None for its default.
    """
    lm = load_model(model, dtype, backend)
    import keras_t5gemma as kt

    functions = {
        Format.onnx: kt.export_onnx,
        Format.ctranslate2: kt.export_ctranslate2,
        Format.saved_model: kt.export_saved_model,
    }
    remove_empty(out)
    functions[format](lm, out, **{name: value for name, value in options.items() if value is not None})
    typer.echo(f"Wrote {out}.")
