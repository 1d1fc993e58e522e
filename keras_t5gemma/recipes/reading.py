"""Reads and checks a recipe file; an error names the file, the key, what came and what would work."""

import dataclasses
import json
import math
import operator
import tomllib
import types
import typing
from pathlib import Path

from keras_t5gemma.recipes.no_effect import keys_without_effect
from keras_t5gemma.recipes.objective_section import check_objective
from keras_t5gemma.recipes.schema import Recipe
from keras_t5gemma.suggestions import did_you_mean

# What each type is called, and for the numbers what TOML may write for it.
_KINDS = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a text in quotes", (str,)),
}


class RecipeError(ValueError):
    """A recipe that cannot be followed."""


def recipe_names():
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


def recipe_path(recipe):
    """The file of a recipe.

    Args:
        recipe: a path, or a name in `recipe_names()`.

    Raises:
        RecipeError: where it is neither.
    """
    path = Path(recipe)
    if not path.suffix and str(recipe) in recipe_names() and not path.is_file():
        return Path(__file__).parent / f"{recipe}.toml"
    if not path.is_file():
        near = did_you_mean(path.stem, recipe_names())
        raise RecipeError(
            f"There is no recipe {str(recipe)!r}: it is no file here and none that comes with the package "
            f"({', '.join(recipe_names())}).{near}"
        )
    return path


def read_recipe(recipe, **overrides):
    """Reads and checks a recipe.

    >>> recipe = read_recipe("run.toml", training={"steps": 100})

    Args:
        recipe: a path, or the name of one that comes with the package: see `recipe_names`.
        **overrides: by section, keys to take these values instead of the file's.

    Returns:
        A `Recipe`, with every key that the file leaves out at its default.

    Raises:
        RecipeError: where the file is missing, is no TOML, or has an unknown key, a missing one, or one of another type
            or out of range.
    """
    path = recipe_path(recipe)
    values = _values(path)
    for section, keys in overrides.items():
        table = values.setdefault(section, {})
        if isinstance(table, dict):
            table.update(keys)
    made = _table(Recipe, values, path, "")
    if made.optimizer.decay_steps is None:
        optimizer = dataclasses.replace(made.optimizer, decay_steps=made.training.steps)
        made = dataclasses.replace(made, optimizer=optimizer)
    _check_together(made, path)
    return made


def stated_keys(recipe):
    """The keys that a recipe's file states, as `section.key`; `recipe` as for `read_recipe`."""
    tables = _values(recipe_path(recipe)).items()
    return {f"{section}.{key}" for section, table in tables if isinstance(table, dict) for key in table}


def to_toml(recipe):
    """A recipe as the text of a file, every key stated, for `read_recipe`."""
    lines = []
    for section, table in dataclasses.asdict(recipe).items():
        lines += [f"[{section}]", *(f"{key} = {_toml(v)}" for key, v in table.items() if v is not None), ""]
    return "\n".join(lines)


def flat(recipe):
    """A recipe as one dict, `section.key` -> value."""
    sections = dataclasses.asdict(recipe).items()
    return {f"{section}.{key}": value for section, table in sections for key, value in table.items()}


def _values(path):
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error


def _toml(value):
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(v)}' for key, v in value.items() if v is not None)} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _table(cls, values, path, place):
    """A section, or the file, or an entry of a list, as its dataclass."""
    where = f"{path}, {place}" if place else str(path)
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: expected a table of keys. Received: {values!r:.80}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kind = "key" if place else "section"
    if unknown := sorted(set(values) - set(fields)):
        raise RecipeError(
            f"{where}: unknown {kind} {unknown[0]!r}.{did_you_mean(unknown[0], fields)} Known {kind}s: "
            f"{', '.join(fields)}."
        )
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:
        raise RecipeError(f"{where}: needs the {kind} {missing[0]!r}. Received: {', '.join(values) or 'nothing'}.")
    hints = typing.get_type_hints(cls)
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            made[name] = _table(hints[name], value, path, f"[{name}]")
        else:
            made[name] = _value(hints[name], value, fields[name].metadata, path, f"{place} {name}")
    return cls(**made)


def _value(hint, value, limits, path, place):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None: TOML has no null, so a value that is there is an X
        return _value(arguments[0], value, limits, path, place)
    if origin is tuple:
        return _list(arguments[0], value, limits, path, place)
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{path}, {place}: expected a table such as {{ S = 7 }}. Received: {value!r:.80}.")
        return {key: _value(arguments[1], item, {}, path, f"{place}.{key}") for key, item in value.items()}
    title, accepted = _KINDS[hint]
    # A bool is an int to Python, but not to a reader.
    good = isinstance(value, accepted) and isinstance(value, bool) == (hint is bool)
    if hint in (int, float):
        good = good and math.isfinite(value)
        for limit, words, holds in (
            ("least", "of at least", operator.ge),
            ("above", "above", operator.gt),
            ("most", "of at most", operator.le),
        ):
            if limit in limits:
                title += f" {words} {limits[limit]}"
                good = good and holds(value, limits[limit])
    near = ""
    if choices := limits.get("choices"):
        title = f"one of {', '.join(map(repr, choices))}"
        near = did_you_mean(value, choices)
        good = good and value in choices
    if not good:
        raise RecipeError(f"{path}, {place}: expected {title}. Received: {value!r:.80}.{near}")
    return float(value) if hint is float else value


def _list(hint, value, limits, path, place):
    if hint is str and isinstance(value, str):
        value = [value]  # one source needs no brackets
    least, most = limits.get("least_items", 0), limits.get("most_items", math.inf)
    if not isinstance(value, list) or not least <= len(value) <= most:
        count = {(2, 2): "two", (1, math.inf): "at least one", (0, 2): "at most two"}.get((least, most), "its")
        raise RecipeError(f"{path}, {place}: expected a list of {count} values. Received: {value!r:.80}.")
    if dataclasses.is_dataclass(hint):
        return tuple(_table(hint, item, path, f"{place}[{i}]") for i, item in enumerate(value))
    return tuple(_value(hint, item, limits, path, f"{place}[{i}]") for i, item in enumerate(value))


def _is_required(field):
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_together(recipe, path):
    """What no key says alone."""
    model, training, output, hardware = recipe.model, recipe.training, recipe.output, recipe.hardware
    taught = recipe.distillation.teacher is not None
    saves = training.steps // training.save_every + bool(training.steps % training.save_every)
    devices = math.prod(hardware.mesh[:1])
    # A part of a batch has a row a device or more; one device takes parts of any size.
    rows = math.lcm(devices * training.accumulation_steps if hardware.mesh else 1, hardware.processes)
    for good, message in (
        (bool(model.preset) != bool(model.adapt), "[model]: needs `preset` or `adapt`, and not both."),
        (
            training.steps % training.log_every == 0,
            f"[training] steps: expected a multiple of log_every={training.log_every}. Received: {training.steps}.",
        ),
        (
            training.evaluate_every % training.log_every == 0,
            f"[training] evaluate_every: expected a multiple of log_every={training.log_every}. Received: "
            f"{training.evaluate_every}.",
        ),
        (
            bool(training.evaluate_every) == bool(recipe.data.validation),
            "[training] evaluate_every and [data] validation go together: state both or neither.",
        ),
        (
            training.cross_attention_steps < training.steps,
            f"[training] cross_attention_steps: expected fewer than steps={training.steps}. Received: "
            f"{training.cross_attention_steps}.",
        ),
        (
            recipe.optimizer.warmup_steps <= recipe.optimizer.decay_steps,
            f"[optimizer] warmup_steps: expected at most decay_steps={recipe.optimizer.decay_steps}, which is "
            f"[training] steps unless stated. Received: {recipe.optimizer.warmup_steps}.",
        ),
        (
            recipe.optimizer.name == "adamw" or recipe.optimizer.beta_1 is recipe.optimizer.beta_2 is None,
            f"[optimizer] beta_1 and beta_2 are AdamW's. Received: name={recipe.optimizer.name!r}.",
        ),
        (
            output.average_last <= min(training.keep, saves),
            f"[output] average_last: expected at most as many checkpoints as are kept (keep={training.keep}) and saved "
            f"({saves}). Received: {output.average_last}.",
        ),
        (
            output.average_last != 1,
            "[output] average_last: a mean takes at least 2 checkpoints; 0 writes the last weights. Received: 1.",
        ),
        (
            not (model.lora_rank and output.average_last),
            "[output] average_last: checkpoints of a model with LoRA cannot be averaged. Set it to 0.",
        ),
        (
            not (model.lora_rank and output.format == "keras"),
            '[output] format: adapters alone are written in PEFT\'s format. Set it to "hf".',
        ),
        (
            training.batch_size % rows == 0,
            f"[training] batch_size: expected a multiple of {rows}, for {devices} devices along the batch, "
            f"processes={hardware.processes} and accumulation_steps={training.accumulation_steps}. Received: "
            f"{training.batch_size}.",
        ),
        (
            hardware.processes == 1 or hardware.mesh,
            f"[hardware] mesh: several processes need one. Received: processes={hardware.processes}.",
        ),
        (
            devices % hardware.processes == 0,
            "[hardware] mesh: each process reads a share of the batch, so the devices along it must be a multiple of "
            f"processes={hardware.processes}. Received: mesh={list(hardware.mesh)}.",
        ),
        (
            hardware.processes == 1 or output.format == "hf",
            "[output] format: several processes write a tensor at a time, a preset is written as a whole. Set it to "
            f'"hf". Received: processes={hardware.processes}.',
        ),
        (
            not (taught and recipe.data.pack),
            "[data] pack: a teacher would see one example from the next. Set it to false to distil.",
        ),
        (
            not (taught and (training.z_loss or training.label_smoothing)),
            "[training] z_loss and label_smoothing are of the loss without a teacher. Leave them out to distil.",
        ),
    ):
        if not good:
            raise RecipeError(f"{path}, {message}")
    try:
        check_objective(recipe.objective)
    except ValueError as error:
        raise RecipeError(f"{path}, [objective]: {error}") from error
    for place, value, why in keys_without_effect(recipe):
        raise RecipeError(f"{path}, {place}: {why} Leave it out. Received: {value!r:.80}.")
