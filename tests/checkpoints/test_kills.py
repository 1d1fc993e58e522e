"""A run that is killed, or finds the disk full, leaves no folder or a whole one, and the next run succeeds."""

import collections
import subprocess
import sys

import numpy as np
import pytest
from helpers.gemma2_folder import write_gemma2
from helpers.peers import tiny_config, tiny_gemma_stack
from helpers.tensors import drawn
from helpers.tiny import NamedArrays

from keras_t5gemma.checkpoints import convert
from keras_t5gemma.checkpoints.hugging_face.export import write_checkpoint
from keras_t5gemma.checkpoints.sources import t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CheckpointError

CONFIG = tiny_config(num_layers=1, hidden_dim=16, vocabulary_size=40)
# A moment is the n-th time that a file is opened, renamed or removed, a folder made or listed, or a piece of a tensor
# read; pieces are small, so that most moments are in the middle of a tensor. The process kills itself, which is sooner
# than anybody else could.
RUN = """
import os, signal, sys
from keras_t5gemma.checkpoints import convert
from keras_t5gemma.checkpoints.hugging_face import reader as files
from keras_t5gemma.checkpoints import tensor_source as tensors

verb, last, target, *sources = sys.argv[1:]
moment, armed = 0, False
def count(*event):
    global moment
    if armed and (not event or event[0] == "open" or event[0].startswith(("os.", "shutil."))):
        moment += 1
        if moment == int(last):
            os.kill(os.getpid(), signal.SIGKILL)

read = files.CheckpointFolder.chunks
def chunks(self, name):
    for piece in read(self, name):
        count()
        yield piece

files.CheckpointFolder.chunks = chunks
files.CHUNK_BYTES = 512
sys.addaudithook(lambda event, _: count(event))
arguments = [sources] if verb == "average_checkpoints" else [*sources, None] if verb.startswith("adapt") else sources
armed = True
getattr(convert, verb)(*arguments, target, max_shard_size=4000)
armed = False
print(moment, "keras" in sys.modules)
"""
# The disk is full after so many bytes of a file: a write then fails as it does on a full disk.
RUN_IN_LITTLE_SPACE = """
import resource, signal, sys
from keras_t5gemma.checkpoints.convert import convert_checkpoint
from keras_t5gemma.checkpoints.tensor_source import CheckpointError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
try:
    convert_checkpoint(*sys.argv[2:])
except CheckpointError as error:
    print(error)
"""
VERBS = ("adapt_gemma2_files", "average_checkpoints", "convert_checkpoint")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What each verb reads."""
    root = tmp_path_factory.mktemp("sources")
    for seed in range(2):
        write_checkpoint(root / f"t5gemma_{seed}", CONFIG, NamedArrays(drawn(seed, "float32", CONFIG)))
    write_gemma2(root / "gemma2", tiny_gemma_stack(num_layers=1, hidden_dim=16))
    return {
        "adapt_gemma2_files": [root / "gemma2"],
        "average_checkpoints": [root / "t5gemma_0", root / "t5gemma_1"],
        "convert_checkpoint": [root / "t5gemma_0"],
    }


def run(verb, sources, target):
    """The same in this process."""
    arguments = {"adapt_gemma2_files": [*sources, None], "average_checkpoints": [sources]}.get(verb, sources)
    getattr(convert, verb)(*arguments, target, max_shard_size=4000)


def run_until(moment, verb, sources, target):
    return python(RUN, verb, str(moment), target, *sources)


def python(program, *arguments):
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """By verb: how many moments a run has, and the weights it writes."""
    runs = {}
    for verb in VERBS:
        target = tmp_path_factory.mktemp("whole") / "out"
        done = run_until(0, verb, sources[verb], target)
        assert done.returncode == 0, done.stderr
        moments, imports_keras = done.stdout.split()
        assert imports_keras == "False"
        runs[verb] = int(moments), weights_of(target)
    return runs


def weights_of(folder):
    tensors = t5gemma_source(folder).tensors
    return {name: tensors.read(name).tobytes() for name in tensors.names()}


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("verb", VERBS)
def test_killed_run_leaves_no_folder_or_a_whole_one_and_the_next_succeeds(verb, seed, sources, whole, tmp_path):
    moments, weights = whole[verb]
    # One in each seventh of the run, the last of which ends with the rename.
    moment = 1 + int(np.random.default_rng([seed, VERBS.index(verb)]).uniform(seed, seed + 1) / 7 * moments)
    target = tmp_path / "out"
    assert run_until(moment, verb, sources[verb], target).returncode == -9
    if target.exists():
        assert weights_of(target) == weights
        target.rename(tmp_path / "first")
    run(verb, sources[verb], target)
    assert weights_of(target) == weights
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "first"}
    assert not [path.name for path in target.iterdir() if path.name.startswith(".")]


def test_last_moments_of_a_run_leave_no_folder_or_a_whole_one(sources, whole, tmp_path):
    verb = "convert_checkpoint"
    moments, weights = whole[verb]
    found = []
    for moment in range(moments - 3, moments + 1):
        target = tmp_path / f"out_{moment}"
        assert run_until(moment, verb, sources[verb], target).returncode == -9
        found.append(target.exists())
        assert not target.exists() or weights_of(target) == weights
    assert True in found  # The rename was among them.
    assert False in found


def test_disk_without_room_is_refused_before_anything_is_written(sources, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"has 0\.00 GB free and the checkpoint takes .* GB\. Free some space"):
        run("convert_checkpoint", sources["convert_checkpoint"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_write_that_fails_half_way_is_one_error_and_leaves_nothing(sources, tmp_path, limit):
    """In the config, in the weights; without a byte to write."""
    done = python(RUN_IN_LITTLE_SPACE, str(limit), *sources["convert_checkpoint"], tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'} could not be written: File too large. Nothing of it was kept")
    assert not list(tmp_path.iterdir())
