"""The command line. Only verbs that compute import Keras, after their arguments have been checked.

checkpoint_verbs  The verbs adapt, export, average, inspect and verify
environment       `env`: versions, backend and devices for bug reports
evaluation        The verb evaluate
generation        The verb generate
inspection        The tables that `inspect` prints
options           Arguments and options that several verbs share
prompts           Prompts from arguments, stdin and files, and one line per answer
runtime_formats   `export` in the formats of other runtimes
session           Shared steps of the verbs: the backend, readable errors, loading and saving models
serving           The verb serve
superglue         The verb superglue
training_verbs    The verbs train and plot
"""

from pathlib import Path
from typing import Annotated

import typer

from keras_t5gemma import __version__
from keras_t5gemma.cli.checkpoint_verbs import add_checkpoint_verbs
from keras_t5gemma.cli.evaluation import evaluate
from keras_t5gemma.cli.generation import generate
from keras_t5gemma.cli.options import BackendOption
from keras_t5gemma.cli.serving import serve
from keras_t5gemma.cli.session import (
    check_free,
    first_free,
    one_line_errors,
    use_backend,
    wide_console,
)
from keras_t5gemma.cli.superglue import superglue
from keras_t5gemma.cli.training_verbs import add_training_verbs

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
add_checkpoint_verbs(app)
add_training_verbs(app)
app.command()(generate)
app.command()(serve)
app.command()(evaluate)
app.command()(superglue)


def _show_version(is_set: bool) -> None:
    if is_set:
        typer.echo(f"keras-t5gemma {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and stop.")
    ] = False,
) -> None:
    """T5Gemma for Keras 3: turn Gemma 2 into an encoder-decoder, train it, generate."""


@app.command()
def env(backend: BackendOption = None) -> None:
    """Show versions, backend and devices, to copy into a bug report; works even if a library does not."""
    from keras_t5gemma.cli.environment import environment

    for name, text in environment(backend and str(backend)):
        typer.echo(f"{name}: {text}")


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write into, new or empty. Default: demo_out, or demo_out_2, ... if that exists."),
    ] = None,
    backend: BackendOption = None,
) -> None:
    """Pretrain a small Gemma 2 on this Python's documentation, adapt it, train it, compare, ask: minutes on a CPU."""
    with one_line_errors():
        out = out or first_free(Path("demo_out"))
        check_free(out)
        use_backend(backend)
        from keras_t5gemma.demo.run import run_demo

        run_demo(out)


@app.command()
def presets() -> None:
    """List the published checkpoints, their sizes and their places on the hubs."""
    from rich.table import Table

    from keras_t5gemma.checkpoints.tensor_table import parameter_count
    from keras_t5gemma.config import T5GemmaConfig
    from keras_t5gemma.presets import PRESETS, STACKS

    table = Table(caption="On Kaggle, in Keras format: kaggle://keras/t5-gemma/keras/PRESET/1")
    table.add_column("preset")
    table.add_column("parameters", justify="right")
    table.add_column("Hugging Face")
    for preset in PRESETS.values():
        count = parameter_count(T5GemmaConfig(STACKS[preset.encoder], STACKS[preset.decoder]))
        table.add_row(preset.name, f"{count:,}", preset.hf_handle, end_section=preset.name.endswith("prefixlm_it"))
    wide_console().print(table)
