"""Checks of the keys of the sections `[evaluation]` and `[task]` against others."""

import dataclasses
from collections.abc import Callable

from keras_t5gemma.recipes.schema import ObjectiveSection, Recipe


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


TASK_RULES = (
    Rule(
        "[objective]:",
        lambda r: r.task.head or (r.objective.encoder_length and r.objective.decoder_length),
        "needs encoder_length and decoder_length, unless there is a [task] head. Received: "
        "encoder_length={objective.encoder_length}, decoder_length={objective.decoder_length}.",
    ),
    Rule(
        "[task] head:",
        lambda r: not r.task.head or r.objective == ObjectiveSection(),
        "a task has its own `sequence_length`, and no objective. Leave [objective] out. Received: head={task.head!r}.",
    ),
    Rule(
        "[task] head:",
        lambda r: not (r.task.head and (r.distillation.teacher or r.preference.loss)),
        "a [distillation] teacher and a [preference] loss are for language models. Leave them out. Received: "
        "head={task.head!r}.",
    ),
    Rule(
        "[task] head:",
        lambda r: not (r.task.head and (r.training.z_loss or r.training.label_smoothing)),
        "[training] z_loss and label_smoothing are of the loss of tokens. Leave them out. Received: "
        "head={task.head!r}.",
    ),
    Rule(
        "[task] head:",
        lambda r: not (r.task.head and (r.training.cross_attention_steps or r.data.pack)),
        "[training] cross_attention_steps and [data] pack are for language models. Leave them out. Received: "
        "head={task.head!r}.",
    ),
    Rule(
        "[task] head:",
        lambda r: not (r.task.head and r.evaluation.prompts),
        "a model with a head does not answer [evaluation] prompts. Leave them out. Received: head={task.head!r}.",
    ),
    Rule(
        "[task] head:",
        lambda r: not r.task.head or r.hardware.processes == 1,
        "a task is trained in one process. Received: processes={hardware.processes}.",
    ),
    Rule(
        "[task] labels:",
        lambda r: len(r.task.labels) >= _least_labels(r),
        "expected a name per class. Received: {task.labels}.",
    ),
    Rule(
        "[task] labels:",
        lambda r: len(set(r.task.labels)) == len(r.task.labels),
        "expected different names. Received: {task.labels}.",
    ),
    Rule(
        "[task] labels:",
        lambda r: not (r.task.problem == "regression" and r.task.labels),
        "a regression has no classes. Leave it out. Received: {task.labels}.",
    ),
    Rule(
        "[output] format:",
        lambda r: not (r.task.head == "text_classifier" and r.task.pooling == "mean" and r.output.format == "hf"),
        '`transformers` reads the last token only. Set it to "keras" for [task] pooling = "mean".',
    ),
    Rule(
        "[task] text_fields:",
        lambda r: not r.task.head or len(r.task.text_fields) in NUMBERS_OF_FIELDS[r.task.head],
        "expected {fields_of_head}. Received: {task.text_fields}.",
    ),
    Rule(
        "[task] truncate:",
        lambda r: not (r.task.head == "token_classifier" and r.task.truncate == "left"),
        'words are cut at their end: "right". Received: {task.truncate!r}.',
    ),
)
# Per head: how many `text_fields` it has.
NUMBERS_OF_FIELDS = {"text_classifier": (1, 2), "token_classifier": (1,), "text_embedder": range(2, 100)}
FIELDS = {
    "text_classifier": "the field of the text, or the two fields of a pair",
    "token_classifier": "the field of the words",
    "text_embedder": "the fields of the query, of the document and of hard negatives",
}


def _least_labels(recipe: Recipe) -> int:
    """The least number of `[task] labels`."""
    if recipe.task.head == "text_classifier":
        return {"single": 2, "multi": 1, "regression": 0}[recipe.task.problem]
    return 2 if recipe.task.head == "token_classifier" else 0


def held_out_values(recipe: Recipe) -> list[str]:
    """The names of the values in the log of a run that are measured on held-out data."""
    names = [f"val_{name}" for name in recipe.evaluation.metrics] if recipe.evaluation.prompts else []
    if recipe.task.head and recipe.data.validation:
        names.append("val_mean_absolute_error" if recipe.task.problem == "regression" else "val_accuracy")
    return [*names, "val_loss"] if recipe.data.validation else names
