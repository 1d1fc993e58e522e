"""Checks of the keys of the section `[evaluation]` against others."""

import dataclasses
from collections.abc import Callable

from keras_t5gemma.recipes.schema import Recipe


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition on several keys of a recipe.

    Attributes:
        keys: the keys that the message begins with, and the punctuation after them.
        is_met: a function of a `Recipe`.
        text: the expected and the received value, a template of `str.format`. Its names are the sections of the recipe
            and the keys of `_derived_numbers`.
    """

    keys: str
    is_met: Callable[[Recipe], object]
    text: str


EVALUATION_RULES = (
    Rule(
        "[evaluation] prompts and every",
        lambda r: bool(r.evaluation.prompts) == bool(r.evaluation.every),
        "go together: state both or neither.",
    ),
    Rule(
        "[evaluation] every:",
        lambda r: r.evaluation.every % r.training.log_every == 0,
        "expected a multiple of [training] log_every={training.log_every}. Received: {evaluation.every}.",
    ),
    Rule(
        "[evaluation] every:",
        lambda r: r.evaluation.every <= r.training.steps,
        "expected at most [training] steps={training.steps}, or nothing is measured. Received: {evaluation.every}.",
    ),
    Rule(
        "[evaluation] metrics:",
        lambda r: len(set(r.evaluation.metrics)) == len(r.evaluation.metrics),
        "expected each once. Received: {evaluation.metrics}.",
    ),
    Rule(
        "[evaluation] prompts:",
        lambda r: not r.evaluation.prompts or r.hardware.processes == 1,
        "several processes cannot generate while they train. Leave it out, or train in one process. Received: "
        "processes={hardware.processes}.",
    ),
    Rule(
        "[evaluation] best:",
        lambda r: r.evaluation.best in (None, *held_out_values(r)),
        "expected a held-out value of the log: {values}. Received: {evaluation.best!r}.",
    ),
    Rule(
        "[evaluation] best:",
        lambda r: r.evaluation.best != "val_loss" or r.training.evaluate_every <= r.training.steps,
        "it is never measured, as [training] evaluate_every={training.evaluate_every} is more than "
        "steps={training.steps}. Received: {evaluation.best!r}.",
    ),
    Rule(
        "[output] average_last:",
        lambda r: not (r.evaluation.best and r.output.average_last),
        "the model is one checkpoint, that of [evaluation] best={evaluation.best!r}, or a mean of several. Set it to 0 "
        "or leave out `best`. Received: {output.average_last}.",
    ),
)


def held_out_values(recipe: Recipe) -> list[str]:
    """The names of the values in the log of a run that are measured on held-out data."""
    names = [f"val_{name}" for name in recipe.evaluation.metrics] if recipe.evaluation.prompts else []
    return [*names, "val_loss"] if recipe.data.validation else names
