"""Runs a recipe, and resumes a run that was stopped."""

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import keras
from rich.console import Console
from rich.progress import Progress

from keras_t5gemma.checkpoints.atomic_folder import new_folder
from keras_t5gemma.checkpoints.convert import average_checkpoints
from keras_t5gemma.checkpoints.hugging_face.export import export_to_hugging_face
from keras_t5gemma.checkpoints.hugging_face.peft import save_lora
from keras_t5gemma.checkpoints.processes import gather, on_all_processes
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.recipes.components import compiled_model, held_out_batches, reference, training_data
from keras_t5gemma.recipes.cross_checks import precomputes_reference
from keras_t5gemma.recipes.devices import distribution, process
from keras_t5gemma.recipes.objective_section import make_objective
from keras_t5gemma.recipes.reading import read_recipe
from keras_t5gemma.recipes.run_folder import MODEL_FOLDER, begin, locked
from keras_t5gemma.recipes.schema import Recipe
from keras_t5gemma.training.callbacks.cross_attention_warmup import CrossAttentionWarmup
from keras_t5gemma.training.callbacks.log_file import HELD_OUT
from keras_t5gemma.training.callbacks.progress_bar import ProgressBar, TokenRate, progress_display
from keras_t5gemma.training.callbacks.training_log import TrainingLog
from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint
from keras_t5gemma.training.checkpointing.weights import load_training_weights, training_weights

CHECKPOINTS_FOLDER, REFERENCE_FOLDER = "checkpoints", "reference"


def run_recipe(recipe: Recipe | str | Path, console: Console | None = None) -> Path:
    """Trains a model by a recipe. If the recipe's folder holds a run that was stopped, the run continues.

    The folder of the run holds the recipe, which states every key; `log.csv`; `tensorboard/` if the recipe asks for it;
    `checkpoints/`; `reference/` if preferences need one; and at the end `model/`, which `from_preset` takes.

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
            lm = _fit(recipe, folder, index, console)
            _write_model(lm, recipe, folder)
            _print_once(console, index, f"Wrote {model_folder}.")
    return model_folder


def _print_once(console: Console, index: int, text: str) -> None:
    if index == 0:
        console.print(text)


def _fit(recipe: Recipe, folder: Path, index: int, console: Console) -> T5GemmaSeq2SeqLM:
    """Trains the model to the recipe's last step, from the last checkpoint in the folder if there is one."""
    training = recipe.training
    keras.utils.set_random_seed(training.seed)
    objective = make_objective(recipe.objective)
    lm = cast(Any, compiled_model(recipe))  # keras-hub's class does not say the type of `preprocessor`
    stored = reference(recipe, lm, folder / REFERENCE_FOLDER) if precomputes_reference(recipe) else None
    data = training_data(recipe, lm.preprocessor, objective, index, stored)
    held_out = held_out_batches(recipe, lm.preprocessor, objective, index, stored)
    checkpoint = TrainingCheckpoint(folder / CHECKPOINTS_FOLDER, save_every=training.save_every, keep=training.keep)
    callbacks = []
    if training.cross_attention_steps:
        callbacks.append(CrossAttentionWarmup(steps=training.cross_attention_steps))
    with progress_display(console) if index == 0 else contextlib.nullcontext() as display:
        callbacks += _reporters(recipe, folder, checkpoint, held_out, display)
        # An epoch is as long as a row of the log, whose numbers are its means. A run that continues keeps them.
        lm.fit(
            checkpoint.data(data),
            epochs=training.steps // training.log_every,
            steps_per_epoch=training.log_every,
            verbose=0,
            callbacks=[*callbacks, checkpoint],
        )
    return lm


def _reporters(
    recipe: Recipe,
    folder: Path,
    checkpoint: TrainingCheckpoint,
    held_out: dict[str, tuple] | None,
    display: Progress | None,
) -> list[keras.callbacks.Callback]:
    """The callbacks that count, show and log.

    Args:
        recipe: a `Recipe`.
        folder: the run's.
        checkpoint: the run's.
        held_out: of `held_out_batches`.
        display: shows the progress bar; None in all processes but the first, which only measure.

    Returns:
        A list of callbacks.
    """
    training = recipe.training
    tokens = TokenRate(checkpoint, recipe.hardware.processes)
    log = partial(
        TrainingLog,
        tokens=tokens,
        held_out=held_out,
        evaluate_every=max(1, training.evaluate_every // training.log_every),
    )
    if display is None:
        return [tokens, log(None, checkpoint)]
    bar = ProgressBar(display, "train", training.steps, tokens=tokens, done=lambda: checkpoint.batches)

    def show(row: dict) -> None:
        display.console.print(_line(row, bar.time_left()), soft_wrap=True)

    def show_first_step(logs: dict | None = None) -> None:  # noqa: ARG001 Keras's signature
        if checkpoint.batches:
            text = f"Going on from step {checkpoint.batches:,} of {training.steps:,}."
            display.console.print(text, soft_wrap=True)

    resumed = keras.callbacks.LambdaCallback(on_train_begin=show_first_step)
    return [tokens, resumed, bar, log(folder, checkpoint, tensorboard=recipe.output.tensorboard, on_row=show)]


def _line(row: dict[str, float], time_left: Sequence[str]) -> str:
    """A row of the log as text. Without a terminal, the bar is printed only once, at the end."""
    numbers = {name: value for name, value in row.items() if not math.isnan(value)}
    parts = [f"step {row['step']:,}", f"loss {row['loss']:.3f}"]
    parts += [f"{name.replace(HELD_OUT, 'held out', 1)} {numbers[name]:.3f}" for name in numbers if HELD_OUT in name]
    if "tokens_per_second" in numbers:
        parts.append(f"{numbers['tokens_per_second']:,.0f} tokens/s")
    return ", ".join([*parts, *time_left])


def _write_model(lm: T5GemmaSeq2SeqLM, recipe: Recipe, folder: Path) -> None:
    """Writes the mean of the last checkpoints, the last weights or only adapters, in the recipe's format."""
    output, target = recipe.output, folder / MODEL_FOLDER
    if recipe.model.lora_rank:
        save_lora(lm, target, base_model=recipe.model.preset)
        return
    if recipe.hardware.processes > 1:
        if output.average_last:
            # Each process averages the tensors that it holds, and needs only its own files for that.
            load_training_weights(lm, folder / CHECKPOINTS_FOLDER, last=output.average_last)
        export_to_hugging_face(lm, target)
        return
    if not output.average_last:
        if output.format == "hf":
            export_to_hugging_face(lm, target)
        else:
            _save_preset(lm, target)
        return
    weights = training_weights(folder / CHECKPOINTS_FOLDER, last=output.average_last)
    if output.format == "hf":
        average_checkpoints(weights, target)
        return
    mean = folder / f"{MODEL_FOLDER}_hf"
    if not mean.exists():  # a killed run may have written it
        average_checkpoints(weights, mean)
    _save_preset(T5GemmaSeq2SeqLM.from_preset(str(mean)), target)


def _save_preset(lm: T5GemmaSeq2SeqLM, target: Path) -> None:
    with new_folder(target) as folder:
        lm.save_to_preset(str(folder))
