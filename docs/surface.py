"""The public surface: names with their signatures, commands with their options, recipe keys with their types.

    python docs/surface.py tests/api/public_api.txt     # writes the snapshot that a test compares

Signatures are read from the source, so that nothing here imports Keras and all backends have the same surface.
"""

import ast
import dataclasses
import enum
import functools
import inspect
import re
import sys
import types
import typing
from pathlib import Path

import typer

import keras_t5gemma
from keras_t5gemma.cli import app
from keras_t5gemma.recipes import schema

PACKAGE = Path(keras_t5gemma.__file__).parent
_MODULE = f"{keras_t5gemma.__name__}."
# What a section of a recipe limits its values by, in words.
_LIMITS = {
    "least": "at least {}",
    "above": "above {}",
    "most": "at most {}",
    "least_items": "{} or more items",
    "most_items": "{} or fewer items",
}


@dataclasses.dataclass(frozen=True)
class Name:
    """A public name.

    Attributes:
        name: e.g. "UL2".
        module: the dotted module that holds it.
        room: the first folder or module below the package, e.g. "data".
        signature: with parentheses; empty for a constant.
        members: of a class: its public methods with their signatures, and its properties.
        summary: the first line of the docstring; of a constant, the comment above it, or what its module is.
    """

    name: str
    module: str
    room: str
    signature: str
    members: tuple[str, ...]
    summary: str


@dataclasses.dataclass(frozen=True)
class Option:
    """An argument or an option of a command.

    Attributes:
        name: as it is typed, or as the usage line shows an argument.
        is_argument: whether it is told by its place.
        values: what it takes, such as "int" or "hf|keras"; empty for a switch.
        default: as text; empty if there is none.
        required: whether it must be given.
        help: what the command line says about it.
    """

    name: str
    is_argument: bool
    values: str
    default: str
    required: bool
    help: str


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the command line: its name, its help, its arguments and options."""

    name: str
    help: str
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: with its section, e.g. "training.steps".
        type: e.g. "int", "list of str".
        default: as TOML would have it; empty if there is none.
        required: whether a recipe must have it.
        limits: what its values are limited by, in words.
        help: the docstring's line about it.
    """

    name: str
    type: str
    default: str
    required: bool
    limits: str
    help: str


def public_names():
    """A `Name` for each of `keras_t5gemma.__all__`, in its order."""
    table = keras_t5gemma._MODULES
    return [_public_name(name, _MODULE + table[name]) for name in keras_t5gemma.__all__ if name in table]


def imported_for_type_checkers():
    """`{name: module}` of the imports under `if TYPE_CHECKING:`, the modules as in the table of public names."""
    guarded = [node for node in _tree(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    return {
        alias.asname: node.module.removeprefix(_MODULE)
        for block in guarded
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def commands():
    """A `Command` for the program itself, whose name is empty, and one for each verb, in the order of its help."""
    program = dataclasses.replace(_command(app.registered_callback.callback), name="")
    return [program, *(_command(registered.callback) for registered in app.registered_commands)]


def recipe_keys():
    """`{section: [Key, ...]}` of a recipe, with the entries of lists of tables, such as "objective.mixture"."""
    found = {}
    for field in dataclasses.fields(schema.Recipe):
        _add_section(found, field.name, field.type)
    return found


def snapshot():
    """The whole surface as text, a line per name, member, option and key."""
    lines = ["# The public surface. Written by: python docs/surface.py tests/api/public_api.txt", "", "[names]"]
    for name in public_names():
        lines += [f"{name.name}{name.signature}", *(f"{name.name}.{member}" for member in name.members)]
    lines += ["", "[commands]"]
    for command in commands():
        lines += [command.name] * bool(command.name)
        lines += [f"{command.name} {_said(option)}".strip() for option in command.options]
    lines += ["", "[recipe keys]"]
    for keys in recipe_keys().values():
        for key in keys:
            default = "" if key.required else f" = {key.default}"
            lines.append(f"{key.name}: {key.type}{default}{f'  # {key.limits}' if key.limits else ''}")
    return "\n".join(lines) + "\n"


def section_help(section):
    """What the schema says about a section of a recipe, without its list of keys."""
    text = inspect.getdoc(_sections()[section]).partition("\n")[0].partition(": ")[2]
    return text[:1].upper() + text[1:]


# Names


def _public_name(name, module):
    node, module = _definition(name, module)
    if node is None or isinstance(node, ast.Assign):
        return Name(name, module, _room(module), "", (), _comment(module, node))
    summary = _one_line((ast.get_docstring(node) or "").partition("\n\n")[0])
    if isinstance(node, ast.ClassDef):
        constructor, members = _constructor(node, module), tuple(_members(node, module))
        return Name(name, module, _room(module), constructor, members, summary)
    return Name(name, module, _room(module), f"({ast.unparse(node.args)})", (), summary)


def _room(module):
    return module.removeprefix(_MODULE).partition(".")[0]


def _definition(name, module):
    """The node that defines a name, and its module: this one, or the one that it imports the name from."""
    for node in _tree(_path(module)).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node, module
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return node, module
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_MODULE):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(alias.name, node.module)
    return None, module


def _bases(node, module):
    """`(class, module)` of the class and of its bases in this package, in the order of inheritance, nearly."""
    yield node, module
    for base in node.bases:
        if isinstance(base, ast.Name):
            found, where = _definition(base.id, module)
            if isinstance(found, ast.ClassDef):
                yield from _bases(found, where)


def _constructor(node, module):
    for cls, _ in _bases(node, module):
        for method in cls.body:
            if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__new__"):
                return f"({_without_first(method.args)})"
        if any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list):
            fields = [item for item in cls.body if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.dump(item)]
            said = ["*" if "KW_ONLY" in ast.unparse(field) else ast.unparse(field) for field in fields]
            return f"({', '.join(said)})"
    return "(...)"


def _members(node, module):
    members = {}
    for cls, where in _bases(node, module):
        for item in cls.body:
            if isinstance(item, ast.Assign) and isinstance(item.value, ast.Name):
                # A function of another module as a method.
                found, _ = _definition(item.value.id, where)
                if isinstance(found, ast.FunctionDef):
                    arguments = ast.unparse(found.args).partition(", ")[2]
                    members.setdefault(item.targets[0].id, f"{item.targets[0].id}({arguments})")
                continue
            if not isinstance(item, ast.FunctionDef) or item.name.startswith("_") or item.name in members:
                continue
            decorators = {ast.unparse(decorator) for decorator in item.decorator_list}
            is_property = any(text.endswith(("property", ".setter")) for text in decorators)
            arguments = ast.unparse(item.args) if "staticmethod" in decorators else _without_first(item.args)
            members[item.name] = item.name if is_property else f"{item.name}({arguments})"
    return [members[name] for name in sorted(members)]


def _without_first(arguments):
    """Arguments as they are passed: without `self` or `cls`."""
    text = ast.unparse(arguments)
    return re.sub(r"^(self|cls)(, (/, )?|$)", "", text)


def _comment(module, node):
    """The comment above a constant, or without one what its module is."""
    if node is None:
        return ""
    lines = _path(module).read_text(encoding="utf-8").splitlines()[: node.lineno - 1]
    words = []
    while lines and lines[-1].startswith("#"):
        words.insert(0, lines.pop().lstrip("# "))
    return _one_line(" ".join(words) or ast.get_docstring(_tree(_path(module))).partition("\n\n")[0])


def _path(module):
    path = PACKAGE.joinpath(*module.removeprefix(_MODULE).split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


# Commands. From the functions' own annotations, which are the same in all versions of typer and click.


def _command(function):
    hints = typing.get_type_hints(function, include_extras=True)
    options = [
        _option(parameter, hints[parameter.name]) for parameter in inspect.signature(function).parameters.values()
    ]
    return Command(function.__name__.replace("_", "-"), _one_line(inspect.getdoc(function)), tuple(options))


def _option(parameter, hint):
    kind, info = typing.get_args(hint)[:2]
    kinds = [argument for argument in typing.get_args(kind) if argument is not types.NoneType] or [kind]
    many = any(typing.get_origin(item) is list for item in (kind, *kinds))
    plain = typing.get_args(kinds[0])[0] if typing.get_origin(kinds[0]) is list else kinds[0]
    default = parameter.default.value if isinstance(parameter.default, enum.Enum) else parameter.default
    is_argument = isinstance(info, typer.models.ArgumentInfo)
    is_switch = plain is bool
    said = info.metavar or parameter.name.upper()
    return Option(
        name=said if is_argument else ", ".join(info.param_decls or ("--" + parameter.name.replace("_", "-"),)),
        is_argument=is_argument,
        values="" if is_switch else _values(plain, info) + ", more than once" * (many and not is_argument),
        default="" if is_switch or default in (None, inspect.Parameter.empty) else str(default),
        required=parameter.default is inspect.Parameter.empty,
        help=_one_line(info.help),
    )


def _values(kind, info):
    if issubclass(kind, enum.Enum):
        return "|".join(str(choice.value) for choice in kind)
    limits = [f"{words} {value}" for words, value in (("from", info.min), ("to", info.max)) if value is not None]
    return " ".join([{str: "text", Path: "path"}.get(kind, kind.__name__), *limits])


def _said(option):
    values = f" {option.values}" if option.values and not option.is_argument else ""
    default = f" = {option.default}" if option.default else ""
    return f"{option.name}{values}{default}{' (required)' if option.required else ''}"


# Recipe keys


@functools.cache
def _sections():
    """`{section: dataclass}`."""
    found = {}
    for field in dataclasses.fields(schema.Recipe):
        found[field.name] = field.type
        for inner in dataclasses.fields(field.type):
            if tables := _tables(inner.type):
                found[f"{field.name}.{inner.name}"] = tables
    return found


def _add_section(found, section, cls):
    told = dict(re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(cls), re.MULTILINE))
    keys = found.setdefault(section, [])
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        keys.append(
            Key(
                name=f"{section}.{field.name}",
                type=_type(field.type),
                default="" if required else _toml(default),
                required=required,
                limits=_limits(field.metadata),
                help=_one_line(told[field.name]),
            )
        )
        if tables := _tables(field.type):
            _add_section(found, f"{section}.{field.name}", tables)


def _tables(hint):
    """The dataclass of a list of tables, or None."""
    arguments = [argument for argument in typing.get_args(hint) if dataclasses.is_dataclass(argument)]
    return arguments[0] if arguments else None


def _type(hint):
    arguments = [argument for argument in typing.get_args(hint) if argument not in (types.NoneType, ...)]
    if typing.get_origin(hint) is tuple:
        return "list of tables" if _tables(hint) else f"list of {arguments[0].__name__}"
    if typing.get_origin(hint) is dict:
        return f"table of {arguments[1].__name__}"
    return arguments[0].__name__ if arguments else hint.__name__


def _toml(value):
    if value is None:
        return "left out"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return "{}" if value == {} else str(value)


def _limits(limits):
    words = [_LIMITS[name].format(value) for name, value in limits.items() if name in _LIMITS]
    if choices := limits.get("choices"):
        words.insert(0, "|".join(choices))
    return ", ".join(words)


def _one_line(text):
    return " ".join((text or "").split())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(snapshot(), encoding="utf-8")
