"""The site has everything: each public name, command and recipe key is on a page, and each page in the navigation.

That the site builds without warnings is what `nox -s docs` tests; here is what takes no more than the package itself.
"""

import re
from pathlib import Path

import generate
import pytest
import surface

import keras_t5gemma as kt

ROOT = Path(__file__).parent.parent
GUIDES = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def pages():
    return generate.pages()


def test_every_public_name_is_on_one_reference_page(pages):
    on_pages = [
        name
        for path, text in pages.items()
        if path.startswith("reference/")
        for name in re.findall(r"^::: keras_t5gemma\.(\w+)$", text, re.MULTILINE)
    ]
    assert sorted(on_pages) == sorted(set(kt.__all__) - {"__version__"})


def test_reference_index_says_what_every_name_is(pages):
    rows = re.findall(r"^\| \[`(\w+)`\]\(\S+\) \| (.*) \|$", pages["reference/index.md"], re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(set(kt.__all__) - {"__version__"})
    assert not [name for name, summary in rows if not summary]


def test_every_command_and_option_is_on_the_page_of_the_command_line(pages):
    page = pages["cli.md"]
    for command in surface.commands():
        section = page.partition(f"\n## {command.name}\n")[2].partition("\n## ")[0] if command.name else page
        assert command.help in section
        for option in command.options:
            assert f"| `{option.name}` |" in section, (command.name, option.name)
            assert option.help, (command.name, option.name)


def test_every_recipe_key_is_on_the_page_of_keys(pages):
    page = pages["recipe_keys.md"]
    for section, keys in surface.recipe_keys().items():
        rows = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        for key in keys:
            assert f"| `{key.name.rpartition('.')[2]}` | {key.type} |" in rows, key.name
            assert key.help, key.name


def test_navigation_has_every_page(pages):
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\nplugins:")[0]
    assert sorted(re.findall(r"[\w/]+\.md", navigation)) == sorted(pages)


def test_links_between_pages_lead_to_pages(pages):
    for path, text in pages.items():
        for target in re.findall(
            r"\]\((?![a-z]+:|#)([^)#\s]+)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        ):
            found = (Path(path).parent / target).as_posix()
            assert found in pages or (ROOT / "docs" / found).is_file(), (path, target)


def test_guides_are_the_files_of_the_repository(pages):
    for guide in (path.name for path in (ROOT / "docs").glob("*.md")):
        assert generate.relinked((ROOT / "docs" / guide).read_text(encoding="utf-8"), f"docs/{guide}") == pages[guide]


def test_start_and_reasons_are_the_readme(pages):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```.*?^```", readme, re.DOTALL | re.MULTILINE):
        assert block in pages["index.md"]
    assert pages["why.md"].startswith("# Why another T5Gemma\n")
    assert "Why another" not in pages["index.md"]


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("README.md", "[a](docs/training.md#data) ![b](docs/images/x.png)", "[a](training.md#data) b"),
        ("README.md", "![b](docs/images/demo_losses.png)", "![b](images/demo_losses.png)"),
        ("docs/training.md", "[`c`](../CONTRIBUTING.md), [d](https://x.y)", "[`c`](contributing.md), [d](https://x.y)"),
        ("docs/training.md", "[licence](../LICENSE) `a[0](LICENSE)`", "licence `a[0](LICENSE)`"),
        ("README.md", "```\nx[0](LICENSE)\n```\n[f](LICENSE)", "```\nx[0](LICENSE)\n```\nf"),
    ],
)
def test_links_are_those_of_the_site(source, text, expected):
    assert generate.relinked(text, source) == expected


def test_pages_are_written_with_pictures_and_a_text_for_machines(tmp_path):
    (tmp_path / "docs" / "old.md").parent.mkdir()
    (tmp_path / "docs" / "old.md").touch()
    generate.write(tmp_path / "docs")
    assert not (tmp_path / "docs" / "old.md").exists()
    assert (tmp_path / "docs" / "reference" / "models.md").is_file()
    assert (tmp_path / "docs" / "images" / "demo_losses.png").is_file()
    text = (tmp_path / "docs" / "llms.txt").read_text(encoding="utf-8")
    assert "](training/)" in text
    assert "`kt.UL2(" in text


def test_text_for_machines_links_guides_that_exist_and_names_what_is_public():
    text = (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert not [link for link in links if not (ROOT / "docs" / link).is_file()]
    assert set(re.findall(r"\bkt\.(\w+)", text)) <= set(kt.__all__)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_files_that_pages_name_exist(page):
    path = ROOT / page if (ROOT / page).is_file() else ROOT / "docs" / page
    named = re.findall(r"`((?:\w+/)+\w+\.\w+)`", path.read_text(encoding="utf-8"))
    assert not [name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "keras_t5gemma"))]


@pytest.mark.parametrize("page", GUIDES)
def test_guides_name_no_name_that_is_not_public(page):
    used = re.findall(r"\bkt\.(\w+)", (ROOT / page).read_text(encoding="utf-8"))
    assert set(used) <= set(kt.__all__)
