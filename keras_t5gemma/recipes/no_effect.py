"""Recipe keys that have no effect beside others."""

import dataclasses
from collections.abc import Callable, Iterator

from keras_t5gemma.recipes.objective_section import SUPERVISED
from keras_t5gemma.recipes.schema import ObjectiveSection, Recipe, TaskSection

# (section, keys, whether a recipe uses the keys, the reason if it does not).
RULES: tuple[tuple[str, tuple[str, ...], Callable[[Recipe], object], str], ...] = (
    (
        "model",
        ("tokenizer", "cross_attention", "encoder_attention", "encoder_heads"),
        lambda recipe: recipe.model.adapt,
        "it goes with `adapt`; a preset has its own.",
    ),
    (
        "data",
        ("pair_fields", "answers"),
        lambda recipe: (
            recipe.evaluation.prompts or (recipe.objective.name == SUPERVISED and not recipe.preference.loss)
        ),
        'it is for [evaluation] prompts and the objective "supervised", whose rows are pairs and not preferences.',
    ),
    (
        "data",
        ("field", "documents"),
        lambda recipe: recipe.objective.name != SUPERVISED and not recipe.task.head,
        'it is for raw text; the objective "supervised" has `pair_fields`, a task `text_fields`, each row for itself.',
    ),
    ("data", ("pack_buffer",), lambda recipe: recipe.data.pack, "it is for packed rows, and `pack` is false."),
    (
        "objective",
        ("sentinels", "too_few_sentinels"),
        lambda recipe: _denoises(recipe.objective),
        "it is for denoisers, and the objective has none.",
    ),
    (
        "objective",
        ("mode_tokens",),
        lambda recipe: recipe.objective.name != SUPERVISED,
        'the objective "supervised" has no modes.',
    ),
    (
        "training",
        ("evaluate_batches",),
        lambda recipe: recipe.data.validation and not recipe.task.head,
        "there is no [data] validation, or a task measures all of it.",
    ),
    (
        "distillation",
        ("dtype", "temperature", "hard_weight"),
        lambda recipe: recipe.distillation.teacher,
        "there is no `teacher`.",
    ),
    (
        "preference",
        ("beta", "label_smoothing", "gamma", "alpha", "desirable_weight", "undesirable_weight", "reference"),
        lambda recipe: recipe.preference.loss,
        "there is no `loss`.",
    ),
    (
        "evaluation",
        ("metrics", "max_new_tokens", "limit", "samples", "batch_size"),
        lambda recipe: recipe.evaluation.prompts,
        "there are no `prompts`.",
    ),
    (
        "task",
        tuple(field.name for field in dataclasses.fields(TaskSection) if field.name != "head"),
        lambda recipe: recipe.task.head,
        "there is no `head`.",
    ),
    (
        "task",
        ("labels", "label_field", "stack", "dropout"),
        lambda recipe: recipe.task.head != "text_embedder",
        "it is for classifiers.",
    ),
    (
        "task",
        ("problem", "separator"),
        lambda recipe: recipe.task.head == "text_classifier",
        "it is for text classifiers.",
    ),
    (
        "task",
        ("pooling",),
        lambda recipe: recipe.task.head != "token_classifier",
        "a token classifier has a class per word.",
    ),
    (
        "task",
        ("normalize", "dimensions", "temperature", "matryoshka"),
        lambda recipe: recipe.task.head == "text_embedder",
        "it is for embedders.",
    ),
    ("hardware", ("fully_sharded",), lambda recipe: recipe.hardware.mesh, "there is no `mesh`."),
)


def keys_without_effect(recipe: Recipe) -> Iterator[tuple[str, object, str]]:
    """The keys of a recipe that differ from their defaults, but have no effect.

    The default may be stated, because the recipe in the folder of a run states every key.

    Args:
        recipe: a `Recipe` with a valid objective.

    Yields:
        `(key, value, reason)`, e.g. `("[model] tokenizer", "folder", "it goes with `adapt`; a preset has its own.")`.
    """
    for section, keys, is_used, reason in RULES:
        table = getattr(recipe, section)
        defaults = {
            field.name: {} if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(table)
        }
        for key in keys:
            value = getattr(table, key)
            if value != defaults[key] and not is_used(recipe):
                yield f"[{section}] {key}", value, reason


def _denoises(objective: ObjectiveSection) -> bool:
    names = [objective.name] if objective.name else [part.name for part in objective.mixture]
    return bool(objective.denoisers) or any(name not in ("prefixlm", SUPERVISED) for name in names)
