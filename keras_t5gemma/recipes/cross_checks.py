"""Checks of recipe keys against each other."""

import dataclasses
import math
from collections.abc import Iterator

from keras_t5gemma.recipes.objective_section import SUPERVISED
from keras_t5gemma.recipes.schema import PREFERENCES_WITH_REFERENCE, Recipe
from keras_t5gemma.recipes.section_rules import EVALUATION_RULES, FIELDS, TASK_RULES, Rule, held_out_values

RULES = (
    *TASK_RULES,
    Rule("[model]:", lambda r: bool(r.model.preset) != bool(r.model.adapt), "needs `preset` or `adapt`, and not both."),
    Rule(
        "[training] steps:",
        lambda r: r.training.steps % r.training.log_every == 0,
        "expected a multiple of log_every={training.log_every}. Received: {training.steps}.",
    ),
    Rule(
        "[training] evaluate_every:",
        lambda r: r.training.evaluate_every % r.training.log_every == 0,
        "expected a multiple of log_every={training.log_every}. Received: {training.evaluate_every}.",
    ),
    Rule(
        "[training] evaluate_every and [data] validation",
        lambda r: bool(r.training.evaluate_every) == bool(r.data.validation),
        "go together: state both or neither.",
    ),
    Rule(
        "[training] cross_attention_steps:",
        lambda r: r.training.cross_attention_steps < r.training.steps,
        "expected fewer than steps={training.steps}. Received: {training.cross_attention_steps}.",
    ),
    Rule(
        "[optimizer] warmup_steps:",
        lambda r: r.optimizer.decay_steps is not None and r.optimizer.warmup_steps <= r.optimizer.decay_steps,
        "expected at most decay_steps={optimizer.decay_steps}, which is [training] steps unless stated. Received: "
        "{optimizer.warmup_steps}; 100 is the default. Add `warmup_steps` to [optimizer].",
    ),
    Rule(
        "[optimizer] beta_1 and beta_2",
        lambda r: r.optimizer.name == "adamw" or r.optimizer.beta_1 is r.optimizer.beta_2 is None,
        "are AdamW's. Received: name={optimizer.name!r}.",
    ),
    Rule(
        "[output] average_last:",
        lambda r: r.output.average_last <= min(r.training.keep, _num_checkpoints(r)),
        "expected at most as many checkpoints as are kept (keep={training.keep}) and saved ({checkpoints}). Received: "
        "{output.average_last}.",
    ),
    Rule(
        "[output] average_last:",
        lambda r: r.output.average_last != 1,
        "a mean takes at least 2 checkpoints; 0 writes the last weights. Received: 1.",
    ),
    Rule(
        "[output] average_last:",
        lambda r: not (r.model.lora_rank and r.output.average_last),
        "checkpoints of a model with LoRA cannot be averaged. Set it to 0.",
    ),
    Rule(
        "[output] format:",
        lambda r: not (r.model.lora_rank and r.output.format == "keras" and not r.task.head),
        'adapters alone are written in PEFT\'s format. Set it to "hf".',
    ),
    Rule(
        "[data] weights:",
        lambda r: not r.data.weights or len(r.data.weights) == len(r.data.sources) > 1,
        "expected a number for each of the sources, of which there are two or more. Received: {data.weights} for "
        "sources={data.sources}.",
    ),
    Rule(
        "[data] weights:",
        lambda r: not r.data.weights or not (r.preference.loss or r.task.head),
        "sources are mixed for texts and for pairs, not for [preference] or [task]. Leave them out. Received: "
        "{data.weights}.",
    ),
    Rule(
        "[training] batch_size:",
        lambda r: r.training.batch_size % _row_multiple(r) == 0,
        "expected a multiple of {rows}, for {devices} devices along the batch, processes={hardware.processes} and "
        "accumulation_steps={training.accumulation_steps}. Received: {training.batch_size}.",
    ),
    Rule(
        "[hardware] mesh:",
        lambda r: r.hardware.processes == 1 or r.hardware.mesh,
        "several processes need one. Received: processes={hardware.processes}.",
    ),
    Rule(
        "[hardware] mesh:",
        lambda r: _batch_devices(r) % r.hardware.processes == 0,
        "each process reads a share of the batch, so the devices along it must be a multiple of "
        "processes={hardware.processes}. Received: mesh={mesh}.",
    ),
    Rule(
        "[output] format:",
        lambda r: r.hardware.processes == 1 or r.output.format == "hf",
        "several processes write a tensor at a time, a preset is written as a whole. Set it to "
        '"hf". Received: processes={hardware.processes}.',
    ),
    Rule(
        "[data] pack:",
        lambda r: r.distillation.teacher is None or not r.data.pack,
        "a teacher would see one example from the next. Set it to false to distil.",
    ),
    Rule(
        "[preference] loss:",
        lambda r: r.preference.loss is None or r.objective.name == SUPERVISED,
        'needs [objective] name = "supervised": its rows are prompts and answers. Received: loss={preference.loss!r}.',
    ),
    Rule(
        "[preference] loss:",
        lambda r: not (r.preference.loss and r.distillation.teacher),
        "and a [distillation] teacher are two losses. State one of them. Received: loss={preference.loss!r}.",
    ),
    Rule(
        "[preference] reference:",
        lambda r: r.preference.reference is None or r.preference.loss in (None, *PREFERENCES_WITH_REFERENCE),
        "loss={preference.loss!r} reads no reference. Leave it out. Received: reference={preference.reference!r}.",
    ),
    Rule(
        "[preference] reference:",
        lambda r: r.preference.reference != "lora_off" or r.model.lora_rank,
        "the model without its LoRA needs [model] lora_rank. Received: reference={preference.reference!r}.",
    ),
    Rule(
        "[preference] reference:",
        lambda r: not precomputes_reference(r) or r.hardware.processes == 1,
        'several processes cannot compute it beforehand. Set it to "lora_off", or train in one process. Received: '
        "processes={hardware.processes}.",
    ),
    Rule(
        "[data] pack:",
        lambda r: not (r.preference.loss and r.data.pack),
        "a row holds one prompt. Set it to false for preferences.",
    ),
    Rule(
        "[training] z_loss and label_smoothing",
        lambda r: not (r.preference.loss and (r.training.z_loss or r.training.label_smoothing)),
        "are of the loss of tokens. Leave them out; preferences have [preference] label_smoothing.",
    ),
    Rule(
        "[training] z_loss and label_smoothing",
        lambda r: r.distillation.teacher is None or not (r.training.z_loss or r.training.label_smoothing),
        "are of the loss without a teacher. Leave them out to distil.",
    ),
    *EVALUATION_RULES,
)


def precomputes_reference(recipe: Recipe) -> bool:
    """Whether a run computes the log-probabilities of a reference before it trains."""
    section = recipe.preference
    return section.loss in PREFERENCES_WITH_REFERENCE and section.reference != "lora_off"


def broken_rules(recipe: Recipe) -> Iterator[str]:
    """Checks a recipe by the rules above.

    Args:
        recipe: a `Recipe`, whose `optimizer.decay_steps` is an integer.

    Yields:
        The message of each rule that the recipe breaks.
    """
    for rule in RULES:
        if not rule.is_met(recipe):
            sections = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
            yield f"{rule.keys} {rule.text.format(**sections, **_derived_numbers(recipe))}"


def _derived_numbers(recipe: Recipe) -> dict[str, object]:
    return {
        "checkpoints": _num_checkpoints(recipe),
        "devices": _batch_devices(recipe),
        "rows": _row_multiple(recipe),
        "mesh": list(recipe.hardware.mesh),
        "fields_of_head": FIELDS.get(recipe.task.head or ""),
        "values": ", ".join(held_out_values(recipe)) or "nothing, as no held-out value is measured",
    }


def _num_checkpoints(recipe: Recipe) -> int:
    """Checkpoints that a run saves: one every `save_every` steps, and one at the end."""
    steps, save_every = recipe.training.steps, recipe.training.save_every
    return steps // save_every + bool(steps % save_every)


def _batch_devices(recipe: Recipe) -> int:
    """Devices along the batch."""
    return math.prod(recipe.hardware.mesh[:1])


def _row_multiple(recipe: Recipe) -> int:
    """The number of which a batch has a multiple of rows.

    On a mesh each part of an accumulated batch has at least one row per device. A single device takes parts of any
    size.
    """
    hardware = recipe.hardware
    parts = _batch_devices(recipe) * recipe.training.accumulation_steps if hardware.mesh else 1
    return math.lcm(parts, hardware.processes)
