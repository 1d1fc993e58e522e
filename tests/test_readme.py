"""The README tells the truth: its commands exist and are those of CI, its table is the computed one.

Its Python, and that of the other pages, runs in `test_pages`.
"""

import re
import runpy
from pathlib import Path

import pytest
import typer

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.tensor_table import parameter_count
from keras_t5gemma.cli import app
from keras_t5gemma.presets import PAIRS, STACKS
from keras_t5gemma.training.optimizers.learning_rates import rate_by_width

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_training_guides_recipe_is_good_and_says_what_its_python_says(tmp_path):
    text, evaluation = blocks("toml", TRAINING)
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    recipe = kt.read_recipe(tmp_path / "my.toml")
    python = blocks("python", TRAINING)[0]
    lengths = recipe.objective.encoder_length, recipe.objective.decoder_length
    for said in (
        f'adapt_gemma2("{recipe.model.adapt[0]}", dtype="{recipe.model.dtype}")',
        f'optimizer("{recipe.optimizer.name}", learning_rate=1e-4, steps={recipe.training.steps:_})',
        f"text_source({recipe.data.sources[0]!r})".replace("'", '"'),
        f"UL2{lengths}, batch_size={recipe.training.batch_size}",
        f'"{recipe.output.folder}", save_every={recipe.training.save_every}, keep={recipe.training.keep}',
        f"last={recipe.output.average_last}",
    ):
        assert said in python
    (tmp_path / "measured.toml").write_text(text.replace("average_last = 5\n", "") + evaluation, encoding="utf-8")
    assert kt.read_recipe(tmp_path / "measured.toml").evaluation.best == "val_rougeL"


def test_classification_guides_recipe_is_good_and_says_what_its_python_says(tmp_path):
    text = (ROOT / "docs" / "classify.md").read_text(encoding="utf-8")
    (toml,) = blocks("toml", text)
    (tmp_path / "films.toml").write_text(toml, encoding="utf-8")
    recipe = kt.read_recipe(tmp_path / "films.toml")
    python = blocks("python", text)[0]
    for said in (recipe.model.preset, f"labels={list(recipe.task.labels)}", f"dropout={recipe.task.dropout}"):
        assert said.replace("'", '"') in python


def test_command_line_examples_name_verbs_that_exist():
    used = set(re.findall(r"keras-t5gemma ([a-z]+)", README))
    assert used == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_options_in_command_lines_are_those_of_their_verbs(page):
    commands = typer.main.get_command(app).commands
    lines = re.findall(r"keras-t5gemma ([a-z]+)([^`\n]*)", (ROOT / page).read_text(encoding="utf-8"))
    for verb, rest in lines:
        known = {name for parameter in commands[verb].params for name in parameter.opts} | {"--help"}
        assert set(re.findall(r"--[a-z][a-z0-9-]*", rest)) <= known, f"keras-t5gemma {verb}{rest}"


def test_ci_runs_the_test_command():
    (command,) = [block for block in blocks("bash") if "nox" in block]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_preset_table_has_the_computed_sizes():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (\d+) x (\d+) \| (\d+) x (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == len(PAIRS)
    for (pair, parameters, *sizes), (encoder, decoder) in zip(rows, PAIRS, strict=True):
        assert pair == f"{encoder}_{decoder}"
        stacks = STACKS[encoder], STACKS[decoder]
        assert int(parameters.replace(",", "")) == parameter_count(kt.T5GemmaConfig(*stacks))
        assert [int(size) for size in sizes] == [n for stack in stacks for n in (stack.num_layers, stack.hidden_dim)]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/generation.md"]
)
def test_links_between_pages_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not (path.parent / link).exists()]


def test_training_guides_tables_and_rates_are_the_computed_ones():
    computed = runpy.run_path(str(ROOT / "benchmarks" / "training_memory.py"))
    assert computed["optimizer_table"]() in TRAINING
    assert computed["size_table"]() in TRAINING
    rows = re.findall(r"^\| (AdamW, Muon|Adafactor) \| (all weights|LoRA) \| (.+) \|$", TRAINING, re.MULTILINE)
    assert len(rows) == 4
    for optimizers, what, said in rows:
        for name in optimizers.lower().split(", "):
            what_trains = {"all weights": "full", "LoRA": "lora"}[what]
            rates = [rate_by_width(name, what_trains, STACKS[size].hidden_dim) for size in ("s", "2b", "9b")]
            assert said == " | ".join(f"{rate:.1e}" for rate in rates)
