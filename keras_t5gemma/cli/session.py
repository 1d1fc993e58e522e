"""Shared steps of the verbs: the backend, readable errors, loading and saving models."""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from keras_t5gemma.cli.options import Dtype, InferenceDtype
    from keras_t5gemma.hub import PresetFolder
    from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM


class Backend(enum.StrEnum):
    """Backends of Keras that can train."""

    jax = "jax"
    tensorflow = "tensorflow"
    torch = "torch"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A context that prints errors which a user can correct as one line, and ends the program with status 1.

    Other errors are bugs of this package, and keep their traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        typer.secho(f"Error: {' '.join(str(error).split())}", fg="red", err=True)
        raise typer.Exit(1) from error


def use_backend(backend: str | None) -> None:
    """Chooses Keras's backend and imports Keras. The choice is possible only before the import.

    Args:
        backend: a `Backend`, or `None` for KERAS_BACKEND, else JAX if it is installed, else Keras's own choice.

    Raises:
        ValueError: if the backend is unknown or cannot train, or Keras already runs on another one.
        ImportError: if the backend is not installed.
    """
    name = backend or os.environ.get("KERAS_BACKEND") or ("jax" if importlib.util.find_spec("jax") else None)
    if name is not None:
        if name not in list(Backend):
            raise ValueError(f"KERAS_BACKEND must be one of {', '.join(Backend)}. Received: {name!r}.")
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"The backend {name} is not installed: `pip install 'keras-t5gemma[{name}]'` installs it."
            )
        os.environ["KERAS_BACKEND"] = str(name)
    with _quiet_import():
        import keras
        import keras_hub  # noqa: F401 so that a later import prints nothing
        import sentencepiece
    sentencepiece.set_min_log_level(1)  # only warnings, without a line for each tokenizer that is read
    if name is not None and keras.backend.backend() != name:
        raise ValueError(f"Keras runs on {keras.backend.backend()} already, so it cannot run on {name}.")


def check_free(out: Path) -> None:
    """Refuses a file or a folder that is not empty, before hours of work instead of after them."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not empty. Choose another folder, or remove it first.")


def first_free(path: Path) -> Path:
    """The path itself if it does not exist, else the first of name_2, name_3, ... that does not."""
    numbered = (path.with_name(f"{path.stem}_{i}{path.suffix}") for i in itertools.count(2))
    names = itertools.chain([path], numbered)
    return next(name for name in names if not name.exists())


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """A context in which imports print nothing to stderr, unless they fail.

    keras-hub imports TensorFlow on every backend. TensorFlow writes to the file descriptor before it reads any of its
    own settings about that.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(stderr, log.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def wide_console() -> Console:
    """A console for tables, at least 100 characters wide, so that rows are not wrapped in a pipe."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 100)
    return console


def load_model(model: str | PresetFolder, dtype: Dtype | str | None, backend: Backend | None) -> T5GemmaSeq2SeqLM:
    """Loads the model of a preset.

    Args:
        model: an argument of `from_preset`, or a `PresetFolder`.
        dtype: a dtype policy, or None for the preset's.
        backend: a `Backend`, or None.

    Returns:
        A `T5GemmaSeq2SeqLM`.

    Raises:
        ValueError: as for `from_preset`.
    """
    from keras_t5gemma.checkpoints.sources import open_t5gemma

    folder = open_t5gemma(model)  # before Keras is imported, so that an unknown name fails at once
    use_backend(backend)
    import keras_t5gemma as kt

    options: dict[str, Any] = {"dtype": str(dtype)} if dtype else {}
    return kt.T5GemmaSeq2SeqLM.from_preset(folder, **options)


def load_for_inference(model: str, dtype: InferenceDtype | None, backend: Backend | None) -> T5GemmaSeq2SeqLM:
    """Loads the model of a preset, by default in the dtype that suits the hardware.

    Args:
        model: an argument of `from_preset`.
        dtype: an `InferenceDtype`, or None for the default.
        backend: a `Backend`, or None.

    Returns:
        A `T5GemmaSeq2SeqLM`.

    Raises:
        ValueError: as for `from_preset`.
    """
    from keras_t5gemma.checkpoints.sources import open_t5gemma

    folder = open_t5gemma(model)
    use_backend(backend)
    return load_model(folder, inference_dtype(dtype, folder), backend)


def inference_dtype(dtype: InferenceDtype | None, folder: PresetFolder | Path) -> str | None:
    """The `dtype` of `from_preset` on this hardware.

    Args:
        dtype: an `InferenceDtype`, or None for the default.
        folder: the preset's.

    Returns:
        A dtype policy, or None for the saved one.
    """
    import keras

    from keras_t5gemma.kernels.device import on_cpu

    plain = "float32" if on_cpu(keras.ops.zeros(())) else "bfloat16"
    if dtype is None:
        return None if _is_quantized(folder) else plain
    return f"{dtype}_from_{plain}" if dtype.startswith("int") else str(dtype)


def _is_quantized(folder: PresetFolder | Path) -> bool:
    """Whether a preset was saved with quantized weights, according to its config."""
    config = folder / "config.json"
    return config.is_file() and any(mode in config.read_text(encoding="utf-8") for mode in ('"int8', '"int4'))


def remove_empty(out: Path) -> None:
    """Removes an empty folder that `check_free` has accepted, so that a new one can be renamed to it."""
    if out.is_dir():
        out.rmdir()


def save_model(lm: T5GemmaSeq2SeqLM, out: Path, keras_format: bool) -> None:
    """Writes a model to a folder, which appears under its name when it is complete.

    Args:
        lm: the model.
        out: the folder, which does not exist or is empty.
        keras_format: whether to write a Keras preset, rather than Hugging Face's format.
    """
    import keras_t5gemma as kt
    from keras_t5gemma.checkpoints.atomic_folder import new_folder

    remove_empty(out)
    if keras_format:
        with new_folder(out) as partial:
            lm.save_to_preset(str(partial))
    else:
        kt.export_to_hugging_face(lm, out)
    typer.echo(f"Wrote {out}.")
