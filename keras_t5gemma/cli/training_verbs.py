"""The verbs train and plot."""

from pathlib import Path
from typing import Annotated

import typer

from keras_t5gemma.cli.options import BackendOption
from keras_t5gemma.cli.session import first_free, one_line_errors, use_backend


def add_training_verbs(app: typer.Typer) -> None:
    """Adds the verbs of this module to the command line."""
    for verb in (train, plot):
        app.command()(verb)


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A .toml file, or the name of one that comes with the package.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: the recipe's.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Total number of optimizer steps. Default: the recipe's. With more steps, a finished run continues at "
            "its final learning rate.",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe, to copy and change, and do nothing else.")
    ] = False,
    backend: BackendOption = None,
) -> None:
    """Train by a recipe. The same command continues a run that was stopped."""
    with one_line_errors():
        from keras_t5gemma.recipes.reading import read_recipe, recipe_path
        from keras_t5gemma.recipes.run_folder import check_run, with_more_steps

        if show:
            typer.echo(recipe_path(recipe).read_text(encoding="utf-8"), nl=False)
            return
        options = {"training": {"steps": steps}, "output": {"folder": out and str(out)}}
        overrides = {
            section: {key: value}
            for section, table in options.items()
            for key, value in table.items()
            if value is not None
        }
        parsed = read_recipe(recipe, **overrides)
        if steps is not None:
            parsed = with_more_steps(parsed, recipe)
        # Errors of the folder and the texts also come before Keras is imported.
        check_run(Path(parsed.output.folder), parsed)
        from keras_t5gemma.data.sources.open import text_source
        from keras_t5gemma.recipes.prompts import held_out_prompts

        for paths in (parsed.data.sources, parsed.data.validation):
            if paths:
                text_source(list(paths), format=parsed.data.format)
        held_out_prompts(parsed)
        use_backend(backend)
        from keras_t5gemma.recipes.run import run_recipe

        run_recipe(parsed)


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, drawn over each other.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The picture, .png, .pdf or .svg. Default: RUN/log.png; for several runs runs.png, or runs_2.png, ... "
            "if that exists."
        ),
    ] = None,
) -> None:
    """Draw loss, held-out loss by denoiser, learning rate and tokens per second of training runs."""
    with one_line_errors():
        from keras_t5gemma.training.callbacks.plots import plot_runs

        if out is None and len(runs) == 1:
            out = runs[0] / "log.png" if runs[0].is_dir() else runs[0].with_suffix(".png")
        out = out or first_free(Path("runs.png"))
        plot_runs(runs, out)
        typer.echo(f"Wrote {out}.")
