"""Reads and checks a recipe file. An error names the file, the key, the value and a valid value."""

import dataclasses
import json
import math
import operator
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_t5gemma.recipes.cross_checks import broken_rules
from keras_t5gemma.recipes.no_effect import keys_without_effect
from keras_t5gemma.recipes.objective_section import check_objective
from keras_t5gemma.recipes.schema import Recipe
from keras_t5gemma.suggestions import did_you_mean

# Type -> (its name in messages, Python's types of TOML values that it accepts).
_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a text in quotes", (str,)),
}


class RecipeError(ValueError):
    """An invalid recipe."""


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


def recipe_path(recipe: str | os.PathLike[str]) -> Path:
    """The file of a recipe.

    Args:
        recipe: a path, or a name in `recipe_names()`.

    Raises:
        RecipeError: if it is neither.
    """
    path = Path(recipe)
    if not path.suffix and str(recipe) in recipe_names() and not path.is_file():
        return Path(__file__).parent / f"{recipe}.toml"
    if not path.is_file():
        near = did_you_mean(path.stem, recipe_names())
        raise RecipeError(
            f"There is no recipe {str(recipe)!r}: it is neither a file nor the name of a recipe of the package "
            f"({', '.join(recipe_names())}).{near}"
        )
    return path


def read_recipe(recipe: str | os.PathLike[str], **overrides: Mapping[str, Any]) -> Recipe:
    """Reads and checks a recipe.

    >>> recipe = read_recipe("run.toml", training={"steps": 100})

    Args:
        recipe: a path, or the name of a recipe that comes with the package: see `recipe_names`.
        **overrides: section -> `{key: value}`, values that replace the file's.

    Returns:
        A `Recipe`, with defaults for the keys that the file leaves out.

    Raises:
        RecipeError: if the file is missing or is not TOML, a key is unknown or missing, or a value has another type or
            is out of range.
    """
    path = recipe_path(recipe)
    values = _values(path)
    for section, keys in overrides.items():
        table = values.setdefault(section, {})
        if isinstance(table, dict):
            table.update(keys)
    hardware = values.get("hardware")
    if isinstance(hardware, dict) and hardware.get("processes") == "auto":
        hardware["processes"] = _started_processes(path)
    parsed: Recipe = _table(Recipe, values, path, "")
    if parsed.optimizer.decay_steps is None:
        optimizer = dataclasses.replace(parsed.optimizer, decay_steps=parsed.training.steps)
        parsed = dataclasses.replace(parsed, optimizer=optimizer)
    _check_keys_together(parsed, path)
    return parsed


def stated_keys(recipe: str | os.PathLike[str]) -> set[str]:
    """The keys in a recipe's file, as `section.key`; `recipe` as for `read_recipe`."""
    tables = _values(recipe_path(recipe)).items()
    return {f"{section}.{key}" for section, table in tables if isinstance(table, dict) for key in table}


def to_toml(recipe: Recipe) -> str:
    """The text of a recipe file that states every key, for `read_recipe`."""
    lines = []
    for section, table in dataclasses.asdict(recipe).items():
        lines += [f"[{section}]", *(f"{key} = {_toml(v)}" for key, v in table.items() if v is not None), ""]
    return "\n".join(lines)


def flat(recipe: Recipe) -> dict[str, Any]:
    """A recipe as one dict, `section.key` -> value."""
    sections = dataclasses.asdict(recipe).items()
    return {f"{section}.{key}": value for section, table in sections for key, value in table.items()}


def _values(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error


def _started_processes(path: Path) -> int:
    """The number of processes that were started, for `processes = "auto"`.

    It is in Keras's own variable, or is the number of hosts that Kubernetes on Google Cloud tells each host of a slice.

    Raises:
        RecipeError: if neither says it.
    """
    number, hosts = os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES", ""), os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if number.isdecimal() and int(number):
        return int(number)
    if number or not hosts:
        raise RecipeError(
            f'{path}, [hardware] processes: "auto" reads KERAS_DISTRIBUTION_NUM_PROCESSES, or else counts '
            f"TPU_WORKER_HOSTNAMES. Set one of them, or state the number. Received: {number!r} and {hosts!r}."
        )
    return len(hosts.split(","))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(v)}' for key, v in value.items() if v is not None)} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _table(cls: Any, values: Any, path: Path, place: str) -> Any:
    """Parses a table to its dataclass.

    Args:
        cls: a dataclass of `schema.py`.
        values: the parsed TOML of the whole file, a section, or an entry of a list.
        path: the file, for messages.
        place: the section or key, for messages; "" for the whole file.

    Returns:
        An instance of `cls`.

    Raises:
        RecipeError: if a key is unknown, missing or invalid.
    """
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
    parsed = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            parsed[name] = _table(hints[name], value, path, f"[{name}]")
        else:
            parsed[name] = _value(hints[name], value, fields[name].metadata, path, f"{place} {name}")
    return cls(**parsed)


def _value(hint: Any, value: Any, limits: Mapping[str, Any], path: Path, place: str) -> Any:
    """Parses a value.

    Args:
        hint: the type hint of the key.
        value: the parsed TOML.
        limits: the limits of the key, see `schema.py`.
        path: the file, for messages.
        place: the section and the key, for messages.

    Returns:
        The value in the type of the hint.

    Raises:
        RecipeError: if the value has another type, or is beyond its limits.
    """
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
    # In Python, though not in TOML, a bool is an int.
    is_valid = isinstance(value, accepted) and isinstance(value, bool) == (hint is bool)
    if hint in (int, float):
        is_valid = is_valid and math.isfinite(value)
        for limit, words, is_within in (
            ("least", "of at least", operator.ge),
            ("above", "above", operator.gt),
            ("most", "of at most", operator.le),
        ):
            if limit in limits:
                title += f" {words} {limits[limit]}"
                is_valid = is_valid and is_within(value, limits[limit])
    suggestion = ""
    if choices := limits.get("choices"):
        title = f"one of {', '.join(map(repr, choices))}"
        suggestion = did_you_mean(value, choices)
        is_valid = is_valid and value in choices
    if not is_valid:
        raise RecipeError(f"{path}, {place}: expected {title}. Received: {value!r:.80}.{suggestion}")
    return float(value) if hint is float else value


def _list(hint: Any, value: Any, limits: Mapping[str, Any], path: Path, place: str) -> tuple:
    """Parses a list of values or tables. The arguments are those of `_value`, with the type hint of an item."""
    if hint is str and isinstance(value, str):
        value = [value]  # a single source needs no brackets
    least, most = limits.get("least_items", 0), limits.get("most_items", math.inf)
    if not isinstance(value, list) or not least <= len(value) <= most:
        count = {(2, 2): "two", (1, math.inf): "at least one", (0, 2): "at most two"}.get((least, most), "its")
        raise RecipeError(f"{path}, {place}: expected a list of {count} values. Received: {value!r:.80}.")
    if dataclasses.is_dataclass(hint):
        return tuple(_table(hint, item, path, f"{place}[{i}]") for i, item in enumerate(value))
    return tuple(_value(hint, item, limits, path, f"{place}[{i}]") for i, item in enumerate(value))


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_keys_together(recipe: Recipe, path: Path) -> None:
    """Checks the keys against each other and the objective, and refuses keys without effect."""
    for message in broken_rules(recipe):
        raise RecipeError(f"{path}, {message}")
    try:
        if recipe.task.head is None:
            check_objective(recipe.objective)
    except ValueError as error:
        raise RecipeError(f"{path}, [objective]: {error}") from error
    for key, value, reason in keys_without_effect(recipe):
        raise RecipeError(f"{path}, {key}: {reason} Leave it out. Received: {value!r:.80}.")
