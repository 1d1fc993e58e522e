"""The script of docs/scale.md for several GPUs on PyTorch: processes that average their gradients, stop and resume."""

import os

import keras
import numpy as np
import pytest
from helpers import data_parallel, pages
from helpers.launch import finish, free_address, output, start
from helpers.stand_ins import write_stand_ins

import keras_t5gemma as kt
from keras_t5gemma.training.checkpointing import step_folder

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch.distributed is for PyTorch alone")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    texts = [(pages.ROOT / "README.md").read_text(encoding="utf-8")]
    folder = tmp_path_factory.mktemp("models")
    return write_stand_ins(folder, texts, gemma2=(), t5gemma=(data_parallel.PRESET,))[data_parallel.PRESET]


def start_both(job, model, folder):
    host, port = free_address().split(":")
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    here = os.getcwd()
    os.chdir(folder)
    try:
        return [
            start(data_parallel.__file__, job, model, RANK=str(rank), LOCAL_RANK=str(rank), **environment)
            for rank in range(2)
        ]
    finally:
        os.chdir(here)


def weights(folder, job, rank):
    return dict(np.load(folder / f"{job}_{rank}.npz"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finish(*start_both("whole", model, folder))
    return folder


def assert_equal(found, expected, atol=0.0):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol, err_msg=name)


def test_processes_with_shares_of_the_data_have_the_same_weights_and_save_them(whole):
    first, second = (weights(whole, "whole", rank) for rank in (0, 1))
    assert_equal(first, second)
    saved = kt.T5GemmaSeq2SeqLM.from_preset(whole / "tuned")
    for weight in saved.weights:
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), first[weight.path])


def test_gradient_is_the_mean_of_those_of_the_processes(model, tmp_path):
    finish(*start_both("same", model, tmp_path / "same"))
    lm = kt.T5GemmaSeq2SeqLM.from_preset(model, dtype="float32")
    before = [keras.ops.convert_to_numpy(weight) for weight in lm.weights]
    lm.compile(kt.optimizer(learning_rate=2e-5, steps=data_parallel.STEPS))
    pairs = [(f"{i} + 1 =", str(i + 1)) for i in range(64)]
    data = kt.supervised_dataset(pairs, lm.preprocessor, batch_size=4)
    lm.fit(data, steps_per_epoch=data_parallel.STEPS, verbose=0)
    found = weights(tmp_path / "same", "same", 1)
    assert_equal({w.path: found[w.path] for w in lm.weights}, {w.path: np.array(w) for w in lm.weights}, atol=1e-7)
    assert max(np.abs(np.array(w) - x).max() for w, x in zip(lm.weights, before, strict=True)) > 1e-5


def test_signal_to_one_process_has_both_save_after_the_same_batch_and_they_resume(whole, model, tmp_path):
    folder = tmp_path / "run"
    processes = start_both("stopped", model, folder)
    for process in processes:
        assert process.wait(timeout=120) == 75, output(process)
    for rank in range(2):
        steps = step_folder.steps_in(folder / "run" / f"process_{rank}_of_2")
        assert [path.name for path in steps] == ["step_00000003"]
    finish(*start_both("resumed", model, folder))
    for rank in range(2):
        assert_equal(weights(folder, "resumed", rank), weights(whole, "whole", rank), atol=1e-6)
