"""A run by a recipe, from the command to the averaged model, stopped and gone on with, and what it leaves to read."""

import csv
import json
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import keras_t5gemma as kt
from keras_t5gemma.cli import app
from keras_t5gemma.recipes.reading import read_recipe, recipe_path
from keras_t5gemma.recipes.times import KINDS
from keras_t5gemma.training.callbacks.log_file import read_log
from keras_t5gemma.training.evaluation import mean_loss

COLUMNS = ["step", "loss", "accuracy", "learning_rate", "tokens_per_second"]
HELD_OUT = ["val_loss", "val_loss/prefixlm", "val_loss/R_3_0.15"]


def train(*arguments):
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def whole(here):
    """(folder, output) of the tiny recipe's run, never stopped."""
    code, output = train("tiny")
    assert code == 0, output
    return here / "tiny_run", output


@pytest.fixture(scope="module")
def stopped(whole, here):
    """The folder of the same run, killed as its last row was written, before the checkpoint; and gone on with."""
    folder = here / "stopped"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step_00000012")
    log = (folder / "log.csv").read_text(encoding="utf-8")
    (folder / "log.csv").write_text(log[:-20], encoding="utf-8")
    code, output = train("tiny", "--out", "stopped")
    assert code == 0, output
    assert "Going on from step 8 of 12." in output
    assert "step 8," not in output
    assert "step 10," in output
    return folder


def changed_recipe(old, new):
    text = recipe_path("tiny").read_text(encoding="utf-8")
    assert old in text
    Path("changed.toml").write_text(text.replace(old, new), encoding="utf-8")
    return "changed.toml"


def rows(folder):
    with open(f"{folder}/log.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_run_writes_recipe_log_checkpoints_and_the_mean_of_the_last_ones(whole):
    folder, output = whole
    assert "Wrote tiny_run/model." in output
    assert "Going on" not in output
    assert read_recipe(folder / "recipe.toml") == read_recipe("tiny")
    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert steps == ["step_00000004", "step_00000008", "step_00000012"]
    mean = load_file(folder / "model" / "model.safetensors")
    last = [load_file(folder / "checkpoints" / step / "model" / "model.safetensors") for step in steps[1:]]
    for name, found in mean.items():
        np.testing.assert_allclose(found, (last[0][name] + last[1][name]) / 2, rtol=1e-6, atol=1e-7)
    assert kt.T5GemmaBackbone.from_preset(folder / "model").config.vocabulary_size == 440


def test_times_of_both_starts_add_up_and_count_the_steps_that_were_repeated(whole, stopped):
    (first,) = json.loads((whole[0] / "times.json").read_text(encoding="utf-8"))["starts"]
    before, again = json.loads((stopped / "times.json").read_text(encoding="utf-8"))["starts"]
    assert before == first
    assert (first["first_batch"], first["last_batch"], first["repeated"]) == (0, 12, 0)
    assert (again["first_batch"], again["last_batch"], again["repeated"]) == (8, 12, 4)
    for start in (first, again):
        assert list(start["seconds"]) == list(KINDS)
        assert all(seconds > 0 for seconds in start["seconds"].values())
    assert re.search(r"0:\d\d:\d\d: model and data \d+%, first step, with compiling \d+%, steps \d+%,", whole[1])


def test_log_has_a_row_of_means_an_interval_and_held_out_loss_by_denoiser(whole):
    folder, output = whole
    found = rows(folder)
    assert list(found[0]) == [*COLUMNS, *HELD_OUT]
    assert [int(row["step"]) for row in found] == [2, 4, 6, 8, 10, 12]
    assert [bool(row["val_loss"]) for row in found] == [False, False, True] * 2
    assert float(found[-1]["val_loss"]) < float(found[2]["val_loss"])
    for row in (found[2], found[5]):
        both = [float(row[name]) for name in HELD_OUT]
        assert both[0] == pytest.approx((both[1] + both[2]) / 2, rel=1e-5)
        assert f"held out/R_3_0.15 {both[2]:.3f}" in output
    assert float(found[-1]["learning_rate"]) == pytest.approx(1e-3)


def test_held_out_loss_of_the_log_is_the_trained_models(whole):
    folder, _ = whole
    recipe = read_recipe("tiny")
    lm = kt.T5GemmaSeq2SeqLM.from_preset(folder / "checkpoints" / "step_00000012" / "model")
    lm.compile()
    text = kt.text_source("held_out.txt")
    tokenizer = lm.preprocessor.tokenizer
    denoiser = kt.SpanCorruption(kt.Denoiser(3, 0.15), 16, 16)
    data = kt.pretraining_dataset(text, tokenizer, denoiser, batch_size=4, shuffle=False, num_epochs=1)
    batches = [batch for batch, _ in zip(data, range(recipe.training.evaluate_batches), strict=False)]
    assert mean_loss(lm, batches) == pytest.approx(float(rows(folder)[-1]["val_loss/R_3_0.15"]), rel=1e-4)


def test_run_that_was_stopped_goes_on_to_the_same_log_and_the_same_model(whole, stopped):
    tolerance = 0 if keras.backend.backend() == "jax" else 1e-5
    for before, after in zip(rows(whole[0]), rows(stopped), strict=True):
        for name in ("step", "loss", "learning_rate", *HELD_OUT):
            assert bool(before[name]) == bool(after[name])
            assert float(after[name] or 0) == pytest.approx(float(before[name] or 0), rel=tolerance, abs=0), name
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole[0], stopped))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance)


def test_run_that_is_over_says_so_and_changes_nothing(whole):
    folder, _ = whole
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    code, output = train("tiny")
    assert (code, "trained to its end" in output) == (0, True)
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_run_of_another_recipe_is_refused(whole):
    code, output = train(changed_recipe("learning_rate = 1e-2", "learning_rate = 1e-3"))
    assert (code, "optimizer.learning_rate was 0.01, is 0.001" in output) == (1, True)


def test_run_that_is_over_goes_on_with_more_steps_at_the_rate_it_ended_with(whole, here):
    folder = here / "longer"
    shutil.copytree(whole[0], folder)
    code, output = train("tiny", "--out", "longer", "--steps", "16")
    assert code == 0, output
    assert "Going on from step 12 of 16." in output
    found = rows(folder)
    assert [int(row["step"]) for row in found] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [float(row["learning_rate"]) for row in found[-2:]] == pytest.approx([1e-3, 1e-3])
    assert (folder / "model").is_dir()
    assert (folder / "model_00000012").is_dir()


def test_plot_draws_runs_over_each_other(whole, stopped, here):
    result = CliRunner().invoke(app, ["plot", "tiny_run", "stopped", "--out", "both.png"])
    assert result.exit_code == 0, result.output
    assert (here / "both.png").read_bytes().startswith(b"\x89PNG")
    assert read_log("stopped")["val_loss"][0] == [6, 12]
    result = CliRunner().invoke(app, ["plot", "gemma2"])
    assert (result.exit_code, "log.csv" in result.output) == (1, True)
