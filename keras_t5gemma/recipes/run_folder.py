"""The folder of a run: which recipe it was begun with, and who uses it. Needs no Keras."""

import contextlib
import dataclasses
from pathlib import Path

from filelock import FileLock, Timeout

from keras_t5gemma.recipes.reading import RecipeError, flat, read_recipe, stated_keys, to_toml

RECIPE_FILE, MODEL_FOLDER = "recipe.toml", "model"
# What a run may go on with another value of: none of it changes what a step computes from which data. More steps are
# fine where the recipe states `optimizer.decay_steps`; else the cosine ends with them, and that is another run.
MAY_CHANGE = (
    "data.num_workers",
    "data.validation",
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
_DECAY = "optimizer.decay_steps"


@contextlib.contextmanager
def locked(folder, index):
    """Keeps a second run out of a folder.

    Args:
        folder: of the run; made where it does not exist.
        index: of the process, each of which has a lock of its own.

    Raises:
        RecipeError: where another holds it.
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


def begin(folder, recipe):
    """Writes the recipe into the folder, or the new one where the run goes on.

    A run that is over and goes on for more steps leaves its model as `model_00001000`, say.

    Args:
        folder: of the run.
        recipe: a `Recipe`.

    Returns:
        Whether a model in the folder is what the recipe asks for.

    Raises:
        RecipeError: as for `check_run`.
    """
    begun = check_run(folder, recipe)
    more = begun is not None and begun.training.steps < recipe.training.steps
    if more and (folder / MODEL_FOLDER).exists():
        (folder / MODEL_FOLDER).rename(folder / f"{MODEL_FOLDER}_{begun.training.steps:08d}")
    partial = folder / f".{RECIPE_FILE}.partial"
    partial.write_text(to_toml(recipe), encoding="utf-8")
    partial.replace(folder / RECIPE_FILE)
    return not more


def with_more_steps(recipe, path):
    """A recipe whose steps were raised, with the cosine of the run in its folder.

    The cosine ends with the steps if the file does not say where, so that more steps would be another schedule from the
    first step on, and another run. The run's own has its end behind it; what follows has the rate that it ended with.

    Args:
        recipe: a `Recipe`.
        path: what `read_recipe` made it of.

    Returns:
        A `Recipe`.
    """
    begun_with = Path(recipe.output.folder) / RECIPE_FILE
    if not begun_with.is_file() or _DECAY in stated_keys(path):
        return recipe
    begun = read_recipe(begun_with)
    if begun.training.steps > recipe.training.steps:
        return recipe
    return dataclasses.replace(
        recipe, optimizer=dataclasses.replace(recipe.optimizer, decay_steps=begun.optimizer.decay_steps)
    )


def check_run(folder, recipe):
    """Compares a recipe with the one the run in a folder was begun with.

    Args:
        folder: of the run; there need not be one.
        recipe: a `Recipe`.

    Returns:
        The recipe of the run there, or None where there is none.

    Raises:
        RecipeError: where they differ in what must not change, or the folder holds something else.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        stray = [path.name for path in folder.iterdir() if path.name[0] != "."] if folder.exists() else []
        if stray:
            raise RecipeError(
                f"{folder} holds no run but {', '.join(sorted(stray)[:3])}. Choose a folder that is new or empty."
            )
        return None
    begun = read_recipe(path)
    before, now = flat(begun), flat(recipe)
    if fixed := [key for key in now if now[key] != before[key] and key not in MAY_CHANGE]:
        changes = "; ".join(f"{key} was {before[key]!r}, is {now[key]!r}" for key in fixed)
        hint = (
            " The cosine ends with training.steps, unless decay_steps is stated; `train --steps` keeps it."
            if _DECAY in fixed
            else ""
        )
        raise RecipeError(
            f"{folder} holds a run of another recipe: {changes}.{hint} Put that back to go on with it, or choose "
            f"another folder. What may change: {', '.join(MAY_CHANGE)}."
        )
    return begun
