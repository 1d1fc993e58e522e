"""What every verb needs: a backend, readable errors, and a free place to write to."""

import contextlib
import enum
import importlib.util
import itertools
import os
import sys
import tempfile

import typer


class Backend(enum.StrEnum):
    """What Keras computes with."""

    jax = "jax"
    tensorflow = "tensorflow"
    torch = "torch"


@contextlib.contextmanager
def one_line_errors():
    """What a user can put right is told in a line; anything else is a fault of ours and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        typer.secho(f"Error: {' '.join(str(error).split())}", fg="red", err=True)
        raise typer.Exit(1) from error


def use_backend(backend):
    """Choose Keras's backend and import Keras; it can be chosen only before.

    Args:
        backend: a `Backend`, or `None` for KERAS_BACKEND, else JAX if it is installed, else Keras's own choice.

    Raises:
        ValueError: if it is none that trains, or Keras already runs on another.
        ImportError: if it is not installed.
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
        import keras_hub  # noqa: F401 imported here, where it is quiet
        import sentencepiece
    sentencepiece.set_min_log_level(1)  # warnings, without a line for each tokenizer that is read
    if name is not None and keras.backend.backend() != name:
        raise ValueError(f"Keras runs on {keras.backend.backend()} already, so it cannot run on {name}.")


def check_free(out):
    """Refuse a folder with something in it before hours of work, not after."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not empty. Choose another folder, or remove it first.")


def first_free(path):
    """The path itself if nothing has its name yet, else the first of name_2, name_3, ... that is free."""
    numbered = (path.with_name(f"{path.stem}_{i}{path.suffix}") for i in itertools.count(2))
    names = itertools.chain([path], numbered)
    return next(name for name in names if not name.exists())


@contextlib.contextmanager
def _quiet_import():
    """Keeps TensorFlow, which keras-hub imports on every backend, from greeting at length; errors still show.

    It writes to the file descriptor before any of its own settings for that are read.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(kept, log.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def wide_console():
    """A console for tables, whose rows are kept whole where a pipe has no width."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 100)
    return console


def load_model(model, dtype, backend):
    """The model of a preset, or of a `PresetFolder`, on a backend."""
    from keras_t5gemma.checkpoints.sources import open_t5gemma

    folder = open_t5gemma(model)  # a name that does not exist is told before Keras is imported, which takes seconds
    use_backend(backend)
    import keras_t5gemma as kt

    return kt.T5GemmaSeq2SeqLM.from_preset(folder, **({"dtype": str(dtype)} if dtype else {}))


def load_for_inference(model, dtype, backend, truncate=None):
    """The model of a preset, in the dtype that suits the hardware unless one is asked for.

    Args:
        model: what `from_preset` takes.
        dtype: an `InferenceDtype`, or None.
        backend: a `Backend`, or None.
        truncate: "left" or "right", or None for what the preset says.

    Returns:
        A `T5GemmaSeq2SeqLM`.

    Raises:
        ValueError: as `from_preset`, and for `truncate` without a preprocessor.
    """
    from keras_t5gemma.checkpoints.sources import open_t5gemma

    folder = open_t5gemma(model)
    use_backend(backend)
    lm = load_model(folder, inference_dtype(dtype, folder), backend)
    if truncate is not None:
        if lm.preprocessor is None:
            raise ValueError(f"--truncate cuts texts, and {model} has no preprocessor.")
        lm.preprocessor.truncate = str(truncate)
    return lm


def inference_dtype(dtype, folder):
    """What `from_preset` is to be told for an `InferenceDtype`, or None, on this hardware; None for what was saved."""
    import keras

    from keras_t5gemma.kernels.device import on_cpu

    plain = "float32" if on_cpu(keras.ops.zeros(())) else "bfloat16"
    if dtype is None:
        return None if _is_quantized(folder) else plain
    return f"{dtype}_from_{plain}" if dtype.startswith("int") else str(dtype)


def _is_quantized(folder):
    """Whether a preset was saved with quantized weights, which its config says."""
    config = folder / "config.json"
    return config.is_file() and any(mode in config.read_text(encoding="utf-8") for mode in ('"int8', '"int4'))


def remove_empty(out):
    """Makes way for a new folder where `check_free` found an empty one."""
    if out.is_dir():
        out.rmdir()


def save_model(lm, out, keras_format):
    """Writes a model as a Keras preset or in Hugging Face's format; the folder appears when it is complete."""
    import keras_t5gemma as kt
    from keras_t5gemma.checkpoints.atomic_folder import new_folder

    remove_empty(out)
    if keras_format:
        with new_folder(out) as partial:
            lm.save_to_preset(str(partial))
    else:
        kt.export_to_hugging_face(lm, out)
    typer.echo(f"Wrote {out}.")
