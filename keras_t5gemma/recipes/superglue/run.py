"""Trains the grids of all tasks, and continues where it was stopped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checks import integer
from keras_t5gemma.recipes.run_folder import locked
from keras_t5gemma.recipes.schema import DTYPES
from keras_t5gemma.recipes.superglue.cells import (
    BATCH_SIZES,
    DROPOUTS,
    EPOCHS,
    LEARNING_RATES,
    Grid,
    check_settings,
    read_result,
    write_json,
    write_result,
)
from keras_t5gemma.recipes.superglue.report import mean_accuracy, table, task_summary
from keras_t5gemma.recipes.superglue.tasks import TASKS, read_task
from keras_t5gemma.recipes.superglue.training import Encoded, encode, train_cell
from keras_t5gemma.suggestions import check_choice

RESULTS_FILE = "superglue.json"


def superglue(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    dropouts: Sequence[float] = DROPOUTS,
    epochs: int = EPOCHS,
    sequence_length: int = 512,
    dtype: str = "float32",
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fine-tunes a T5Gemma's encoder on SuperGLUE as arXiv 2504.06225 does, and measures it on the development sets.

    >>> results = kt.superglue("t5gemma_2b_2b_ul2", "SuperGLUE", "superglue_2b", dtype="bfloat16")
    >>> results["mean"], results["tasks"]["BoolQ"]["accuracy"]

    From the paper: a new head on the encoder's last token, all weights of the encoder trained, a grid over learning
    rate, batch size and dropout per task, every task as classification, and the mean accuracy on the development sets
    of COPA, WiC, WSC, RTE, MultiRC, CB and BoolQ. Also for CB and MultiRC it is accuracy, not F1.

    The paper does not give these: the texts are T5's; the values of the grid, 10 epochs, a warm-up over 6% of the steps
    and the weight decay are RoBERTa's for GLUE, followed by a cosine to 0; dropout is that before the head; and of the
    epochs of a cell the best one counts. As the best cell is chosen on the set it is measured on, the numbers are for
    comparing models, not for unseen data.

    Each cell that is finished is a file in `out`, and is not trained again when the same call is repeated. The table is
    printed, and `out/superglue.json` has it too.

    Args:
        model: a T5Gemma, as for `T5GemmaTextClassifier.from_preset`, with a tokenizer.
        data: the folder of SuperGLUE: a folder per task, such as BoolQ, with its own `train.jsonl` and `val.jsonl`.
        out: the folder of the results, new or of the same run.
        tasks: names of tasks; None for all seven.
        learning_rates: the peaks to try.
        batch_sizes: the rows per step to try.
        dropouts: the rates before the head to try.
        epochs: passes over the training set per cell.
        sequence_length: S, the maximum number of tokens of a text. Longer ones are cut, away from the question, with a
            warning that counts them.
        dtype: dtype policy of the encoder.
        seed: of the head, the order and dropout, for each cell.
        console: a `rich.console.Console`, by default one on standard output.

    Returns:
        A dict of `mean`, the mean of the accuracies, None if the loss of all cells of a task became NaN; and `tasks`,
        per task a dict of `accuracy` in [0, 1], `learning_rate`, `batch_size`, `dropout` and `epoch` of the best cell,
        `most_frequent`, the accuracy of the most frequent class, and the numbers of `cells`, those that `diverged`,
        the examples in `train` and `dev`, and texts that were `truncated`.

    Raises:
        ValueError: if an argument is invalid, a file is missing or a row is of another form, or `out` holds something
            else, or results of other settings or files.
    """
    console, folder = console or Console(), Path(out)
    names = list(TASKS if tasks is None else tasks)
    for name in names:
        check_choice(name, "tasks", TASKS)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`tasks` must hold different tasks, at least one. Received: {tasks!r}.")
    grid = Grid(learning_rates, batch_sizes, dropouts)
    check_choice(dtype, "dtype", DTYPES)
    settings = {
        "model": str(model),
        "epochs": integer(epochs, "epochs"),
        "sequence_length": integer(sequence_length, "sequence_length"),
        "dtype": dtype,
        "seed": integer(seed, "seed", least=0),
    }
    splits = {name: read_task(data, name) for name in names}  # all of them, before the first hour of training
    total, number, summaries = len(names) * len(list(grid.cells(names[0]))), 0, {}
    with locked(folder, 0):
        check_settings(folder, settings)
        for name in names:
            checksums = [split.checksum for split in splits[name]]
            encoded, found = _encoded(settings, name, splits[name]), []
            for cell in grid.cells(name):
                number += 1
                result = read_result(folder, cell, checksums)
                if result is None:
                    title = f"{number} of {total}: {cell}"
                    options = {key: settings[key] for key in ("epochs", "dtype", "seed")}
                    result = train_cell(str(model), cell, encoded, **options, title=title, console=console)
                    result = write_result(folder, cell, checksums, result)
                    console.print(_line(result), soft_wrap=True)
                found.append(result)
            summaries[name] = task_summary(splits[name], encoded.truncated, found)
        results = {"mean": mean_accuracy(summaries), "tasks": summaries}
        write_json(folder / RESULTS_FILE, {**results, "settings": settings})
    console.print(table(results))
    return results


def _encoded(settings: dict[str, Any], name: str, splits: tuple) -> Encoded:
    """A task as the model reads it, with a warning if texts were cut."""
    length = settings["sequence_length"]
    encoded = encode(settings["model"], name, splits, length)
    if encoded.truncated:
        count = sum(len(split.texts) for split in splits)
        warn_caller(f"{encoded.truncated} of {count} texts of {name} are cut to sequence_length={length} tokens.")
    return encoded


def _line(result: dict[str, Any]) -> str:
    """What a cell came to."""
    if result["accuracy"] is None:
        return "  the loss is not finite"
    return f"  accuracy {100 * result['accuracy']:.1f} after epoch {result['epoch']}"
