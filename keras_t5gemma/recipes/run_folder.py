"""The folder of a run: its recipe and its lock. Needs no Keras."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from keras_t5gemma.atomic_file import write_atomically
from keras_t5gemma.recipes.reading import RecipeError, flat, read_recipe, stated_keys, to_toml
from keras_t5gemma.recipes.schema import Recipe

RECIPE_FILE, MODEL_FOLDER, CHECKPOINTS_FOLDER = "recipe.toml", "model", "checkpoints"
# Keys whose value may change when a run continues: they change neither the data nor the computation of a step. More
# steps are possible if the recipe states `optimizer.decay_steps`. Otherwise the cosine ends with the steps, so other
# steps are another run.
MAY_CHANGE = (
    "data.num_workers",
    "data.validation",
    "evaluation.batch_size",
    "evaluation.every",
    "evaluation.limit",
    "evaluation.max_new_tokens",
    "evaluation.metrics",
    "evaluation.prompts",
    "evaluation.samples",
    "hardware.fully_sharded",
    "hardware.mesh",
    "model.rematerialize",
    "output.average_last",
    "output.folder",
    "output.format",
    "output.tensorboard",
    "training.accumulation_steps",
    "training.evaluate_batches",
    "training.evaluate_every",
    "training.keep",
    "training.save_every",
    "training.steps",
)
# Of these, those that change the values that `evaluation.best` compares; with that key they must not change.
COMPARED = (
    "data.validation",
    "evaluation.limit",
    "evaluation.max_new_tokens",
    "evaluation.prompts",
    "training.evaluate_batches",
)
_DECAY = "optimizer.decay_steps"


@contextlib.contextmanager
def locked(folder: Path, index: int) -> Iterator[None]:
    """A context in which no second run can use a folder.

    Args:
        folder: the run's; it is created if it does not exist.
        index: the process's. Each process has its own lock.

    Raises:
        RecipeError: if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".lock_{index}", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RecipeError(f"{folder} is being trained in by another process. Choose another folder.") from error
    try:
        yield
    finally:
        lock.release()


def begin(folder: Path, recipe: Recipe) -> bool:
    """Writes the recipe of a run that begins or continues into its folder.

    If a finished run continues for more steps, its model is renamed, e.g. to `model_00001000`.

    Args:
        folder: the run's.
        recipe: a `Recipe`.

    Returns:
        Whether a model in the folder is the recipe's.

    Raises:
        RecipeError: as for `check_run`.
    """
    previous = check_run(folder, recipe)
    has_more_steps = False
    if previous is not None and previous.training.steps < recipe.training.steps:
        has_more_steps = True
        if (folder / MODEL_FOLDER).exists():
            (folder / MODEL_FOLDER).rename(folder / f"{MODEL_FOLDER}_{previous.training.steps:08d}")
    write_atomically(folder / RECIPE_FILE, to_toml(recipe))
    return not has_more_steps


def with_more_steps(recipe: Recipe, path: str | os.PathLike[str]) -> Recipe:
    """Gives a recipe whose steps were raised the cosine of the run in its folder.

    If the file does not say where the cosine ends, it ends with the steps. More steps would then change the schedule
    from the first step on, and be another run. With the run's own cosine, the further steps have its final learning
    rate.

    Args:
        recipe: a `Recipe`.
        path: the argument of `read_recipe` that gave the recipe.

    Returns:
        A `Recipe`.
    """
    previous_path = Path(recipe.output.folder) / RECIPE_FILE
    if not previous_path.is_file() or _DECAY in stated_keys(path):
        return recipe
    previous = read_recipe(previous_path)
    if previous.training.steps > recipe.training.steps:
        return recipe
    return dataclasses.replace(
        recipe, optimizer=dataclasses.replace(recipe.optimizer, decay_steps=previous.optimizer.decay_steps)
    )


def check_run(folder: Path, recipe: Recipe) -> Recipe | None:
    """Compares a recipe with the recipe of the run in a folder.

    Args:
        folder: the run's; it need not exist.
        recipe: a `Recipe`.

    Returns:
        The recipe of the run in the folder, or None if there is no run.

    Raises:
        RecipeError: if they differ in keys that must not change, or the folder holds something else.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        stray = [path.name for path in folder.iterdir() if path.name[0] != "."] if folder.exists() else []
        if stray:
            raise RecipeError(
                f"{folder} holds no run but {', '.join(sorted(stray)[:3])}. Choose a folder that is new or empty."
            )
        return None
    previous = read_recipe(path)
    before, now = flat(previous), flat(recipe)
    may_change = [key for key in MAY_CHANGE if recipe.evaluation.best is None or key not in COMPARED]
    if fixed := [key for key in now if now[key] != before[key] and key not in may_change]:
        changes = "; ".join(f"{key} was {before[key]!r}, is {now[key]!r}" for key in fixed)
        hint = (
            " The cosine ends with training.steps, unless decay_steps is stated; `train --steps` keeps it."
            if _DECAY in fixed
            else ""
        )
        raise RecipeError(
            f"{folder} holds a run of another recipe: {changes}.{hint} Put that back to go on with it, or choose "
            f"another folder. Keys that may change: {', '.join(may_change)}."
        )
    return previous
