"""Runs a recipe, and resumes a run that was stopped."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import keras
from rich.console import Console

from keras_t5gemma.checkpoints.processes import gather, on_all_processes
from keras_t5gemma.recipes.components import compiled_model, held_out_batches, reference, training_data
from keras_t5gemma.recipes.cross_checks import precomputes_reference
from keras_t5gemma.recipes.devices import distribution, process
from keras_t5gemma.recipes.objective_section import make_objective
from keras_t5gemma.recipes.prompts import held_out_prompts
from keras_t5gemma.recipes.reading import read_recipe
from keras_t5gemma.recipes.reporters import HeldOutGeneration, reporters
from keras_t5gemma.recipes.run_folder import CHECKPOINTS_FOLDER, MODEL_FOLDER, begin, locked
from keras_t5gemma.recipes.schema import Recipe
from keras_t5gemma.recipes.tasks.heads import HEADS
from keras_t5gemma.recipes.tasks.held_out import HeldOutRows
from keras_t5gemma.recipes.times import TIMES_FILE, RunTimes
from keras_t5gemma.recipes.written_model import description, write_model
from keras_t5gemma.training.callbacks.cross_attention_warmup import CrossAttentionWarmup
from keras_t5gemma.training.callbacks.progress_bar import progress_display
from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint

REFERENCE_FOLDER = "reference"


def run_recipe(recipe: Recipe | str | Path, console: Console | None = None) -> Path:
    """Trains a model by a recipe. If the recipe's folder holds a run that was stopped, the run continues.

    The folder of the run holds the recipe, which states every key; `log.csv`; `times.json`; `tensorboard/` if it is
    asked for; `checkpoints/`; `reference/` if preferences need one; and at the end `model/`, which `from_preset`
    takes. It has the last weights, or the mean of the last checkpoints, or with `[evaluation] best` the best ones.

    A run continues with the recipe with which it began. A different recipe is refused with a message that names the
    differences. Only keys that do not change the result of a step may differ: see `run_folder.MAY_CHANGE`.

    Args:
        recipe: a `Recipe` of `read_recipe`, or what `read_recipe` takes.
        console: a `rich.console.Console`, by default one on standard output.

    Returns:
        The path of the trained model.

    Raises:
        RecipeError: if the run in the folder was begun with another recipe.
        ValueError: if texts, models or devices do not fit the recipe.
        FloatingPointError: if loss or weights are not finite; the message names the last good checkpoint.
    """
    console = console or Console()
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    folder = Path(recipe.output.folder)
    distributed = distribution(recipe.hardware)  # first: processes connect before anything else is computed
    index = process(recipe.hardware)
    with locked(folder, index):
        model_folder = folder / MODEL_FOLDER
        # The first process decides for all: the others may see a different disk.
        is_finished = on_all_processes(lambda: index == 0 and begin(folder, recipe) and model_folder.exists())
        if gather(is_finished)[0]:
            _print_once(console, index, f"{folder} holds this run already, trained to its end.")
            return model_folder
        with distributed:
            model = _fit(recipe, folder, index, console)
            write_model(model, recipe, folder)
            _print_once(console, index, f"Wrote {model_folder}{description(recipe, folder)}.")
    return model_folder


def _print_once(console: Console, index: int, text: str) -> None:
    if index == 0:
        console.print(text)


class Parts(NamedTuple):
    """What a run consists of.

    Attributes:
        model: a compiled model.
        data: an endless Grain dataset of batches.
        held_out: the `held_out` of `TrainingLog`.
        measuring: callbacks that add other held-out values to the logs.
    """

    model: Any
    data: Any
    held_out: dict[str, tuple] | None
    measuring: Sequence[keras.callbacks.Callback]


def _language_model(recipe: Recipe, folder: Path, index: int, console: Console) -> Parts:
    """The parts of a run that trains an encoder-decoder."""
    pairs = held_out_prompts(recipe)
    measuring = [HeldOutGeneration(recipe, pairs, console)] if pairs else []
    objective = make_objective(recipe.objective)
    lm = cast(Any, compiled_model(recipe))  # keras-hub's class does not say the type of `preprocessor`
    stored = reference(recipe, lm, folder / REFERENCE_FOLDER) if precomputes_reference(recipe) else None
    data = training_data(recipe, lm.preprocessor, objective, index, stored)
    return Parts(lm, data, held_out_batches(recipe, lm.preprocessor, objective, index, stored), measuring)


def _model_with_head(recipe: Recipe) -> Parts:
    """The parts of a run that trains a model with a head."""
    head = HEADS[str(recipe.task.head)]
    model = head.make_model(recipe)
    measuring = []
    if recipe.data.validation:
        every = recipe.training.evaluate_every // recipe.training.log_every
        measuring.append(HeldOutRows(head.measurement(recipe, model), every))
    return Parts(model, head.training_batches(recipe, model), None, measuring)


def _fit(recipe: Recipe, folder: Path, index: int, console: Console) -> Any:
    """Trains the model to the recipe's last step, from the last checkpoint in the folder if there is one."""
    training, began, times = recipe.training, time.perf_counter(), None
    keras.utils.set_random_seed(training.seed)
    parts = _model_with_head(recipe) if recipe.task.head else _language_model(recipe, folder, index, console)
    checkpoint = TrainingCheckpoint(
        folder / CHECKPOINTS_FOLDER,
        save_every=training.save_every,
        keep=training.keep,
        best=recipe.evaluation.best,
    )
    callbacks = []
    if training.cross_attention_steps:
        callbacks.append(CrossAttentionWarmup(steps=training.cross_attention_steps))
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(progress_display(console)) if index == 0 else None
        if display is not None:  # the first process
            times = RunTimes(folder / TIMES_FILE, checkpoint, began)
            callbacks.insert(0, times)
            stack.callback(times.end)
        callbacks += reporters(recipe, folder, checkpoint, parts.held_out, parts.measuring, display)
        # An epoch is as long as a row of the log, whose numbers are its means. A run that continues keeps them.
        parts.model.fit(
            checkpoint.data(parts.data),
            epochs=training.steps // training.log_every,
            steps_per_epoch=training.log_every,
            verbose=0,
            callbacks=[*callbacks, checkpoint],
        )
    if times is not None:
        console.print(times.summary(), soft_wrap=True)
    return parts.model
