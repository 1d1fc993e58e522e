"""The site's pages, into build/docs: the guides as they are, README.md in parts, and a reference from the code.

    python docs/generate.py && mkdocs build --strict     # or: nox -s docs

The reference is made from the public names, the command line from its functions, and the recipe keys from their schema
(`surface`), so that none of them can be left out.
"""

import posixpath
import re
import shutil
from pathlib import Path

import surface

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "docs"
# Rooms of the reference, in the order they are shown in: the first part of a public name's module, and its title.
ROOMS = {
    "models": "Models",
    "config": "Configs",
    "presets": "Presets",
    "text": "Text",
    "data": "Data",
    "training": "Training",
    "inference": "Inference",
    "checkpoints": "Checkpoints",
    "heads": "Heads",
    "evaluation": "Evaluation",
    "reinforcement": "Reinforcement",
    "serving": "Serving",
    "exports": "Exports",
    "recipes": "Recipes",
}
# Sections of README.md that have a page of their own, or that the site's navigation takes the place of.
WHY, NAVIGATION = "Why another T5Gemma", "More"


def pages():
    """`{path in the site: text}` of every page."""
    readme = _read("README.md")
    made = {
        "index.md": _without_sections(readme, WHY, NAVIGATION),
        "why.md": "# " + _section(readme, WHY),
        "results.md": _read(_results()),
        "contributing.md": _read("CONTRIBUTING.md"),
        "changelog.md": _read("CHANGELOG.md"),
        **{path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))},
    }
    sources = {**{page: source for source, page in _sources().items()}, "why.md": "README.md"}
    made = {page: relinked(text, sources[page]) for page, text in made.items()}
    return {**made, **reference_pages(), "cli.md": cli_page(), "recipe_keys.md": recipe_keys_page()}


def reference_pages():
    """A page per room, with what mkdocstrings makes of each name's docstring, and an index of all names."""
    names = surface.public_names()
    index = ["# Reference", "", "Everything that `import keras_t5gemma as kt` offers, by room.", ""]
    made = {}
    for room, title in ROOMS.items():
        mine = [name for name in names if name.room == room]
        made[f"reference/{room}.md"] = _page(f"# {title}", *(f"::: keras_t5gemma.{name.name}" for name in mine))
        index += [f"## [{title}]({room}.md)", "", "| name | what it is |", "| --- | --- |"]
        index += [f"| [`{n.name}`]({room}.md#keras_t5gemma.{n.name}) | {_cell(n.summary)} |" for n in mine]
        index.append("")
    return {"reference/index.md": "\n".join(index), **made}


def cli_page():
    """Every command with its arguments and options."""
    parts = ["# Command line"]
    for command in surface.commands():
        places = [option.name for option in command.options if option.is_argument]
        usage = " ".join(["keras-t5gemma", command.name or "COMMAND", *places, "[OPTIONS]"])
        parts += [f"## {command.name}"] * bool(command.name) + [command.help, f"    {usage}"]
        if command.options:
            rows = [_option_row(option) for option in command.options]
            parts.append("\n".join(["| | values | default | |", "| --- | --- | --- | --- |", *rows]))
    return _page(*parts)


def recipe_keys_page():
    """Every key of a recipe, a table per section."""
    parts = [
        "# Recipe keys",
        "What a file for `keras-t5gemma train` may say; [Training](training.md#in-one-recipe) shows one. A key without "
        "a default must be there if its section is.",
    ]
    for section, keys in surface.recipe_keys().items():
        rows = [
            f"| `{key.name.rpartition('.')[2]}` | {key.type} | {_code(key.default)} | {_cell(key.limits)} "
            f"| {_cell(key.help)} |"
            for key in keys
        ]
        table = ["| key | type | default | values | |", "| --- | --- | --- | --- | --- |", *rows]
        parts += [f"## {section}", surface.section_help(section), "\n".join(table)]
    return _page(*parts)


def relinked(text, source):
    """A page's text with its links made for the site; a link to what the site does not have becomes its words.

    Args:
        text: of the page.
        source: the file it comes from, a path from the root.
    """
    sources = _sources()
    page = sources.get(source, "index.md")

    def relink(match):
        if match["code"] or re.match(r"[a-z]+:|#", match["target"]):
            return match[0]
        path, hash_mark, anchor = match["target"].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in sources:
            target = posixpath.relpath(sources[path], posixpath.dirname(page) or ".")
        elif path.startswith("docs/") and (ROOT / path).is_file():
            target = path.removeprefix("docs/")
        else:
            return match["words"]
        return f"{match['image']}[{match['words']}]({target}{hash_mark}{anchor})"

    pattern = r"(?P<code>```.*?```|`[^`\n]*`)|(?P<image>!?)\[(?P<words>[^\]]+)\]\((?P<target>[^)\s]+)\)"
    return re.sub(pattern, relink, text, flags=re.DOTALL)


def llms_text():
    """docs/llms.txt with its links made for the site, whose pages are folders."""
    text = (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8")
    names = [f"- `kt.{name.name}{name.signature}`: {name.summary}" for name in surface.public_names()]
    return re.sub(r"\]\((\w+)\.md\)", r"](\1/)", text) + "\n## Public names\n\n" + "\n".join(names) + "\n"


def write(folder=OUT):
    """Writes all pages, pictures and llms.txt into a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in pages().items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", folder / "images")
    (folder / "llms.txt").write_text(llms_text(), encoding="utf-8")


def _sources():
    """`{file: page}` of the pages that are files of the repository, paths from the root and in the site."""
    guides = {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")}
    more = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", _results(): "results.md"}
    return {"README.md": "index.md", **more, **guides}


def _results():
    return "benchmarks/README.md"


def _read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def _section(text, title):
    """A section without the marks of its heading."""
    return re.search(rf"^## ({re.escape(title)}\n.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def _without_sections(text, *titles):
    for title in titles:
        text = text.replace("## " + _section(text, title), "")
    return text


def _page(*parts):
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(text):
    return text.replace("|", ", ")


def _code(text):
    return f"`{text}`" if text and text != "left out" else text


def _option_row(option):
    default = "required" if option.required else _code(option.default)
    return f"| `{option.name}` | {_cell(option.values)} | {default} | {_cell(option.help)} |"


if __name__ == "__main__":
    write()
