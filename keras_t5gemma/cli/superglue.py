"""The verb superglue."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_t5gemma.cli.options import BackendOption, Model
from keras_t5gemma.cli.session import one_line_errors, use_backend, wide_console


def superglue(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(help="The folder of SuperGLUE: a folder per task, such as BoolQ, with train.jsonl and val.jsonl."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results, new or of the same run.")],
    tasks: Annotated[str | None, typer.Option(help="Tasks, separated by commas. Default: all seven.")] = None,
    learning_rates: Annotated[
        str | None, typer.Option(help="Learning rates to try, separated by commas. Default: 1e-5,2e-5,3e-5.")
    ] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Batch sizes to try. Default: 16,32.")] = None,
    dropouts: Annotated[str | None, typer.Option(help="Rates of dropout to try. Default: 0,0.1.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs per training. Default: 10.")] = None,
    sequence_length: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens of a text; longer ones are cut.")
    ] = 512,
    dtype: Annotated[str, typer.Option(help="Dtype policy of the encoder, e.g. bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Seed of each training.")] = 0,
    backend: BackendOption = None,
) -> None:
    """Fine-tune the encoder on SuperGLUE as the paper does. The same command continues where it was stopped."""
    with one_line_errors():
        from keras_t5gemma.checkpoints.sources import open_t5gemma
        from keras_t5gemma.recipes.superglue.cells import Grid
        from keras_t5gemma.recipes.superglue.tasks import TASKS, read_task
        from keras_t5gemma.suggestions import check_choice

        lists = {
            "learning_rates": _values(learning_rates, "--learning-rates", float),
            "batch_sizes": _values(batch_sizes, "--batch-sizes", int),
            "dropouts": _values(dropouts, "--dropouts", float),
        }
        options: dict[str, Any] = {name: values for name, values in lists.items() if values is not None}
        # Errors of these also come before Keras is imported.
        Grid(**options)
        names = _values(tasks, "--tasks", str)
        for name in names or TASKS:
            check_choice(name, "--tasks", TASKS)
            read_task(data, name)
        open_t5gemma(model)
        use_backend(backend)
        from keras_t5gemma.recipes.superglue.run import superglue as run_superglue

        if epochs is not None:
            options["epochs"] = epochs
        options |= {"tasks": names, "sequence_length": sequence_length, "dtype": dtype, "seed": seed}
        run_superglue(model, data, out, **options, console=wide_console())
        typer.echo(f"Wrote {out / 'superglue.json'}.")


def _values(text: str | None, option: str, kind: Callable) -> list | None:
    """The values of an option, separated by commas; None if it is not given."""
    if text is None:
        return None
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be values separated by commas. Received: {text!r}.") from error
