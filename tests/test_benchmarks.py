"""Results of benchmarks are rows of known fields, README.md's tables are made of them, and the log has its form."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = sorted((FOLDER / "results").glob("*.jsonl"))
LOG = sorted((FOLDER / "log").iterdir())
HELPERS = {"own_process.py", "record.py", "report.py", "rows.py", "topics.py"}


@pytest.fixture
def module(monkeypatch):
    """`name -> module` of benchmarks/, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("record", "report", "rows", "topics"):
        sys.modules.pop(name, None)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tables_are_those_of_the_results():
    subprocess.run([sys.executable, str(FOLDER / "report.py"), "--check"], check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_row_has_its_topics_fields_in_their_types(path, module):
    problems = module("rows").problems
    assert [found for row in rows(path) if (found := problems(row, path.stem))] == []


@pytest.mark.parametrize(
    "change",
    [
        {"date": "yesterday"},
        {"idle": "yes"},
        {"machine": {"cpu": "AMD EPYC"}},
        {"seconds": "2.1 s"},
        {"seconds": [None]},
        {"unheard_of": 1},
        {"topic": "Loading"},
        {"aim": [{"field": "seconds", "of": None}]},
        {"peer": [{"program": "keras-hub"}]},
    ],
)
def test_a_row_with_a_wrong_field_is_refused(change, module):
    problems = module("rows").problems
    (row, *_) = rows(FOLDER / "results" / "train.jsonl")
    assert not problems(row, "train")
    assert problems(row | change, "train")


def test_a_row_without_a_required_field_is_refused(module):
    checks = module("rows")
    (row, *_) = rows(FOLDER / "results" / "train.jsonl")
    for name in checks.REQUIRED:
        assert checks.problems({key: value for key, value in row.items() if key != name}, "train")


def test_each_file_of_results_has_a_topic(module):
    assert {path.stem for path in FILES} == {topic.file for topic in module("topics").TOPICS}


def test_newest_is_the_last_row_with_peers_for_its_aims(module, monkeypatch):
    report, topics = module("report"), module("topics")
    topic = topics.BY_NAME["A training step"]
    row = next(row for row in rows(FOLDER / "results" / "train.jsonl") if row["aim"] and row["aim"][0]["of"])
    row |= {"peer": [{"program": row["aim"][0]["of"], "seconds": [8.0], "peak_gb": 8.0}]}
    old = row | {"date": "2026-01-01", "seconds": [4.0]}
    new = row | {"date": "2026-01-03", "seconds": [2.0, 1.0, 3.0]}
    alone = row | {"date": "2026-01-04", "peer": []}
    monkeypatch.setattr(report, "rows", lambda _: [alone, new, old])
    assert report.newest(topic) == [(new, alone)]
    assert "seconds: 0.25 of " in report.aim_text(topic, new)
    assert "not measured beside it" in report.aim_text(topic, alone)


def test_a_recorded_row_has_date_commit_machine_versions_and_command(module, monkeypatch, tmp_path):
    record = module("record")
    arguments = SimpleNamespace(record=True, idle="no")
    monkeypatch.setattr(sys, "argv", [str(FOLDER / "float16_loss.py"), "--tokens", "8", "--folder", "/some/where/toy"])
    numbers = {"pieces": 10, "tokens": 8, "width": 4, "hidden_states_percent": 0.1, "table_percent": 0.2}
    row = {"topic": "Float16", "backend": "torch", **numbers}
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.record(SimpleNamespace(record=False, idle=None), [row])
    record.record(arguments, [row])
    (written,) = rows(tmp_path / "float16_loss.jsonl")
    assert written["idle"] is False
    assert written["machine"]["cores"] >= 1
    assert "keras" in written["versions"]
    assert written["command"] == "python benchmarks/float16_loss.py --tokens 8 --folder toy"
    with pytest.raises(ValueError, match="seconds"):
        record.record(arguments, [{**row, "seconds": 1.0}])


def test_each_program_is_named_in_the_readme():
    programs = {path.name for path in FOLDER.glob("*.py")}
    assert {name for name in programs if f"`{name}" not in README} == set()
    table = set(re.findall(r"^\| `(\w+\.py)", README, re.MULTILINE))
    assert table == programs - HELPERS


def test_no_program_is_a_string():
    for path in FOLDER.glob("*.py"):
        assert '"-c"' not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("path", LOG, ids=lambda path: path.stem)
def test_a_log_file_has_verdict_and_sections(path):
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+\.md", path.name)
    title, *_ = text = path.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(rf"# {path.name[:10]}: .+ \((kept|rejected|inconclusive)[^()]*\)", title)
    sections = [line.removeprefix("## ") for line in text if line.startswith("## ")]
    assert sections == ["Question", "Change", "Result", "Rejected", "Machine"]


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/generation.md", "benchmarks/README.md", "log"])
def test_links_to_benchmarks_lead_to_files_and_headings(page):
    for path in LOG if page == "log" else [ROOT / page]:
        for link, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
            target = (path.parent / link).resolve() if link else path
            assert target.exists(), f"{path.name}: {link}"
            if FOLDER in target.parents and anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path.name}: {link}#{anchor}"


def test_files_of_the_log_that_code_names_exist():
    code = [path for folder in ("keras_t5gemma", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert missing(code, r"benchmarks/log/[\w-]+\.md") == set()


def test_tests_that_programs_name_exist():
    assert missing(FOLDER.rglob("*.py"), r"tests/[\w/]+\.py") == set()


def missing(paths, pattern):
    """Names of files that some files have and that are not there."""
    named = {name for path in paths for name in re.findall(pattern, path.read_text(encoding="utf-8"))}
    return {name for name in named if not (ROOT / name).exists()}
