"""What the project says about itself in files that nothing else reads: versions, sessions, hosts."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import keras_t5gemma as kt

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SESSIONS = {
    node.name
    for node in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and any("session" in ast.unparse(item) for item in node.decorator_list)
}


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def test_version_is_said_once():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "keras_t5gemma/__init__.py"
    assert not re.search(r"^version", read("CITATION.cff"), re.MULTILINE)


def test_changelog_has_a_section_of_this_version_below_unreleased():
    titles = re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)
    assert titles[:2] == ["Unreleased", kt.__version__]


@pytest.mark.parametrize(
    "page",
    [*(f".github/workflows/{path.name}" for path in WORKFLOWS), ".github/PULL_REQUEST_TEMPLATE.md", "CONTRIBUTING.md"],
)
def test_sessions_of_nox_that_pages_name_exist(page):
    named = re.findall(r"nox -s \"?(\w+)", read(page))
    assert set(named) <= SESSIONS


def test_workflows_run_each_python_that_is_supported_with_each_backend():
    matrix = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]["tests"]["strategy"]["matrix"]
    supported = [item.rpartition(" ")[2] for item in PROJECT["project"]["classifiers"] if "Python :: 3." in item]
    assert matrix == {"python": supported, "backend": ["jax", "tensorflow", "torch"]}
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_forms_and_workflows_are_yaml_with_what_github_needs(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "workflows":
        # YAML reads `on` as a truth value.
        assert {"name", "jobs", "permissions"} < set(content)
    elif path.parent.name == "ISSUE_TEMPLATE" and path.name != "config.yml":
        assert {"name", "description", "body"} <= set(content)


def test_bug_form_asks_for_backend_and_versions():
    (form,) = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("bug.yml")]
    asked = {item["id"]: item for item in yaml.safe_load(form.read_text(encoding="utf-8"))["body"]}
    assert asked["backend"]["attributes"]["options"] == ["jax", "tensorflow", "torch"]
    assert "keras-t5gemma env" in asked["environment"]["attributes"]["description"]


def test_linter_of_hooks_is_one_that_the_project_allows():
    (hooks,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]
    least = re.search(r'"ruff>=([\d.]+)"', read("pyproject.toml"))[1]
    numbers = [tuple(map(int, text.split("."))) for text in (hooks["rev"].lstrip("v"), least)]
    assert numbers[0] >= numbers[1]


def test_site_fetches_nothing_from_other_hosts():
    text = read("mkdocs.yml")
    assert "  font: false\n" in text
    assert not re.search(r"https?://", text)
