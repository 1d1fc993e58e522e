"""Runs that are killed, twenty times, at each moment of a save: they end as runs that were not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import killed_runs
from helpers.launch import python_path
from helpers.resumed import TOLERANCE

SCRIPT = Path(killed_runs.__file__)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of 20 kills of three runs, and what each of them ended with."""
    folder = tmp_path_factory.mktemp("killed")
    # Each start compiles the same again.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, str(SCRIPT), str(folder)]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": python_path(), **cache}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-8000:]
    return folder, json.loads(result.stdout.splitlines()[-1])


def test_kills_are_twenty_and_fall_between_saves_and_into_each_moment_of_one(killed):
    _, kills = killed
    assert len(kills) == 20
    assert {moment for _, moment, _ in kills} == {"batch", "writing", "renaming", "removing"}


@pytest.mark.parametrize("name", ["ul2", "packed", "epochs"])
def test_killed_run_ends_with_the_weights_optimizer_and_dropout_of_one_that_was_not(killed, name):
    # That no example is skipped or comes twice, each run checks itself: see `Recording` there.
    folder, _ = killed
    found, expected = np.load(folder / f"{name}_killed.npz"), np.load(folder / f"{name}_whole.npz")
    assert set(found) == set(expected)
    for variable in expected:
        np.testing.assert_allclose(found[variable], expected[variable], rtol=0, atol=TOLERANCE, err_msg=variable)


@pytest.mark.parametrize("name", ["ul2", "packed", "epochs"])
def test_killed_run_logs_its_last_epoch_as_one_that_was_not(killed, name):
    folder, _ = killed
    found, expected = (json.loads((folder / f"{name}_{kind}.npz.json").read_text()) for kind in ("killed", "whole"))
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_saving_changes_nothing_about_training(killed):
    folder, _ = killed
    found, expected = np.load(folder / "packed_whole.npz"), np.load(folder / "packed_plain.npz")
    for variable in expected:
        np.testing.assert_allclose(found[variable], expected[variable], rtol=0, atol=TOLERANCE, err_msg=variable)


def test_killed_run_leaves_the_newest_checkpoints_and_nothing_half_done(killed):
    folder, _ = killed
    for name in ("ul2", "packed", "epochs"):
        assert sorted(path.name for path in (folder / f"{name}_killed").iterdir()) == ["step_00000021", "step_00000024"]
