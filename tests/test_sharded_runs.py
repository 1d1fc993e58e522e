"""A run of two processes whose weights are cut in shards over both: killed, gone on with, and read without them.

JAX alone has processes. Two launches of both: the first ends as one process is killed, the second does all the rest.
"""

import json
import re

import keras
import numpy as np
import pytest
from helpers import sharded_runs
from helpers.launch import PROCESSES, finish, free_address, output, start
from helpers.tiny_recipe import write_tiny_recipe
from safetensors.numpy import load_file

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.training.checkpointing import step_folder as resume_files

CONFIG = sharded_runs.CONFIG
LAST_STEP = f"step_{sharded_runs.LAST:08d}"
on_jax = keras.config.backend() == "jax"


def start_both(job, folder):
    address, cache = free_address(), {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    arguments = dict(devices=2, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", **cache)
    return [start(sharded_runs.__file__, job, index, address, folder, **arguments) for index in range(PROCESSES)]


def arrays(folder, index, step=LAST_STEP):
    return load_file(folder / f"process_{index}_of_2" / step / resume_files.ARRAYS_FILE)


def steps(folder):
    return [[path.name for path in resume_files.steps_in(folder / f"process_{i}_of_2")] for i in range(PROCESSES)]


def model(folder):
    return load_file(folder / "model.safetensors")


def assert_same_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def weights(model):
    return {variable.path: np.array(keras.ops.convert_to_numpy(variable)) for variable in model.weights}


if on_jax:

    @pytest.fixture(scope="module")
    def killed(tmp_path_factory):
        """The folder after the first launch, and the checkpoints of the killed run in it."""
        folder = tmp_path_factory.mktemp("sharded")
        first, second = start_both("train", folder)
        try:
            assert second.wait(timeout=300) == -9, output(second)
        finally:
            first.kill()
            second.kill()
        first.wait()
        return folder, steps(folder / "killed")

    @pytest.fixture(scope="module")
    def runs(killed):
        """The folder after the second launch, and what each process said."""
        folder, _ = killed
        (folder / "recipe").mkdir()
        write_tiny_recipe(folder / "recipe")
        finish(*start_both("go_on", folder))
        return folder, [json.loads((folder / f"errors_{index}.json").read_text()) for index in range(PROCESSES)]

    def test_process_was_killed_when_the_other_had_written_one_checkpoint_more(killed):
        assert [names[-1] for names in killed[1]] == ["step_00000006", "step_00000004"]

    def test_run_goes_on_from_the_newest_checkpoint_of_which_each_process_has_its_part(runs):
        assert [told["batches"] for told in runs[1]] == [4, 4]

    def test_killed_run_ends_to_the_bit_as_one_that_was_not(runs):
        folder, _ = runs
        for index in range(PROCESSES):
            found, expected = (arrays(folder / name, index) for name in ("killed", "whole"))
            assert {name.partition("/")[0] for name in found} == {"model", "optimizer", "metrics"}
            assert_same_arrays(found, expected)
        assert steps(folder / "killed") == steps(folder / "whole") == [[f"step_{i:08d}" for i in (4, 6, 8)]] * 2

    def test_signal_to_one_process_has_both_save_after_the_same_batch_and_leave(runs):
        folder, told = runs
        (code, newest, batches), other = (errors["preempted"] for errors in told)
        assert [code, newest, batches] == other
        assert code == 75
        assert 3 <= batches < sharded_runs.LAST and newest == f"step_{batches:08d}"
        for index in range(PROCESSES):
            # The optimizers are numbered in each program.
            found, expected = (
                {
                    re.sub(r"/adam_w[_\d]*/", "/adam_w/", name): array
                    for name, array in arrays(folder / run, index).items()
                }
                for run in ("preempted", "whole")
            )
            assert_same_arrays(found, expected)

    def test_early_stopping_ends_the_run_of_both_processes_and_a_restart_does_not_train(runs):
        folder, told = runs
        for (first, quiet), (again, warned) in (errors["early"] for errors in told):
            assert (first, quiet, again) == (sharded_runs.LAST, [], 0)
            assert len(warned) == 1 and "is over: EarlyStopping on loss ended it after 2 epochs" in warned[0]
        assert steps(folder / "early") == [[f"step_{i:08d}" for i in (4, 6, 8)]] * 2

    def test_no_process_writes_a_whole_matrix_nor_two_the_same_shard(runs):
        folder, _ = runs
        for tensor in tensor_specs(CONFIG):
            # Of the weight and of both of Adam's moments.
            of_tensor = re.compile(rf"(model/\d+/|optimizer/.*){re.escape(tensor.path).replace('/', '[/_]')}[^/]*\[.*")
            held = [{k: a for k, a in arrays(folder / "whole", i).items() if of_tensor.fullmatch(k)} for i in (0, 1)]
            if len(tensor.shape) == 1:
                continue
            assert len(held[0]) == len(held[1]) == 3 * 2
            assert not held[0].keys() & held[1].keys()
            for array in [*held[0].values(), *held[1].values()]:
                assert array.size == np.prod(tensor.shape) / 4

    def test_model_of_the_run_is_written_by_the_first_process_and_loads(runs):
        folder, _ = runs
        lm = kt.T5GemmaSeq2SeqLM.from_preset(str(folder / "exported"))
        assert lm.preprocessor.tokenizer.vocabulary_size() == CONFIG.vocabulary_size
        parts = [arrays(folder / "killed", index) for index in range(PROCESSES)]
        for path, value in weights(lm.backbone).items():
            for part in parts:
                for key in (key for key in part if re.fullmatch(rf"model/\d+/{path}\[.*", key)):
                    box = [slice(*map(int, ends.split(":"))) for ends in re.search(r"\[(.*)\]", key)[1].split(",")]
                    np.testing.assert_array_equal(value[tuple(box)], part[key])

    def test_weights_are_put_together_from_all_parts_by_one_process(runs):
        folder, _ = runs
        folders = kt.training_weights(folder / "killed", last=2)
        assert [path.parent.name for path in folders] == ["step_00000006", LAST_STEP]
        assert_same_arrays(model(folders[1]), model(folder / "exported"))
        assert kt.T5GemmaSeq2SeqLM.from_preset(str(folders[1])).preprocessor is not None
        kt.average_checkpoints(folders, folder / "averaged")
        assert_same_arrays(model(folder / "averaged"), model(folder / "mean"))

    def test_model_of_one_process_is_filled_from_all_parts(runs):
        folder, _ = runs
        lm = sharded_runs.compiled()
        kt.load_training_weights(lm, folder / "killed")
        expected = kt.T5GemmaBackbone.from_preset(str(folder / "exported"))
        assert_same_arrays(weights(lm.backbone), weights(expected))

    def test_own_part_is_all_that_a_process_needs(runs):
        folder, _ = runs
        assert_same_arrays(model(folder / "from_own_part"), model(folder / "exported"))

    def test_checkpoint_goes_into_another_mesh_where_all_parts_can_be_read(runs):
        folder, told = runs
        assert_same_arrays(model(folder / "other_mesh"), model(folder / "exported"))
        for index in range(PROCESSES):
            message = told[index]["other mesh, own part"]
            for words in ("'shape': [4]", "'shape': [1, 4]", f"sees the parts of processes [{index}]", "all their"):
                assert words in message

    def test_missing_part_is_told_by_all_processes_and_nothing_is_removed(runs):
        folder, told = runs
        for messages in told:
            for words in ("all 2 processes had written step_00000006", "[8, 0]", "Put the missing folders back"):
                assert words in messages["missing part"]
        assert steps(folder / "missing")[0] == steps(folder / "killed")[0]

    def test_damaged_part_is_told_by_all_processes(runs):
        _, told = runs
        assert told[0]["damaged part"].startswith("Process 1 of 2 could not go on: CheckpointError: ")
        for messages in told:
            assert f"process_1_of_2/{LAST_STEP}/training.safetensors is damaged" in messages["damaged part"]
            assert f"Remove {LAST_STEP}, and newer ones" in messages["damaged part"]

    def test_export_that_the_first_process_cannot_write_is_told_by_all(runs):
        _, told = runs
        assert "exists already" in told[0]["existing folder"]
        assert "Process 0 could not write" in told[1]["existing folder"]

    def test_checkpoint_that_one_process_cannot_write_stops_all(runs):
        _, told = runs
        assert told[1]["full disk"] == "No space left on device"
        assert told[0]["full disk"].endswith("CheckpointError: No space left on device")

    def test_lora_in_shards_is_saved_and_merged_as_that_of_one_process(runs):
        folder, _ = runs
        lm = sharded_runs.with_lora()
        for name, write in (("adapter", kt.save_lora), ("merged", kt.export_to_hugging_face)):
            write(lm, folder / f"{name}_of_one")
            (file,) = (path.name for path in (folder / name).glob("*.safetensors"))
            found, expected = (load_file(folder / suffixed / file) for suffixed in (name, f"{name}_of_one"))
            assert found.keys() == expected.keys()
            for key, array in expected.items():
                np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-6, err_msg=key)

    def test_one_process_is_refused_the_run_of_two(runs):
        with pytest.raises(CheckpointError, match=r"of 2 process\(es\), and this is one of 1.*load_training_weights"):
            sharded_runs.fit(sharded_runs.compiled(), runs[0] / "killed", 0)

    def test_recipe_of_two_processes_ends_with_the_mean_of_its_sharded_checkpoints(runs):
        folder = runs[0] / "recipe" / "tiny_run"
        folders = kt.training_weights(folder / "checkpoints", last=2)
        kt.average_checkpoints(folders, folder / "averaged")
        assert_same_arrays(model(folder / "model"), model(folder / "averaged"))
        assert kt.T5GemmaSeq2SeqLM.from_preset(str(folder / "model")).backbone.config.vocabulary_size == 440
        assert len((folder / "log.csv").read_text().splitlines()) == 7
