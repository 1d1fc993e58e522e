"""Checkpoints in parts, as several processes write them, read by one: region by region, on every backend."""

import shutil

import grain
import keras
import numpy as np
import pytest
from keras import ops

from keras_t5gemma.checkpoints.tensor_source import DTYPES, CheckpointError
from keras_t5gemma.training.checkpointing import model_state as resume_state
from keras_t5gemma.training.checkpointing import step_folder as resume_files
from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint
from keras_t5gemma.training.checkpointing.shards import SavedArrays
from keras_t5gemma.training.checkpointing.weights import load_training_weights, training_weights

KERNEL = np.arange(24, dtype="float32").reshape(6, 4)
BIAS = np.array([1, 2, 3, 4], DTYPES["BF16"])
MESH = {"shape": [2], "axes": ["batch"]}


def batches():
    return grain.MapDataset.range(8).map(lambda i: (np.full(6, i, "float32"), np.ones(4, "float32"))).batch(4)


def small_model(units=4):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(units)])
    model.compile("sgd", "mse")
    return model


def write(folder, step=8, factor=1.0):
    """The first process has the first two rows of a kernel, the second the others; both have the bias."""
    run = resume_state.description(small_model())
    paths = [variable.path for variable in small_model().variables]
    kernel, bias = (f"model/{place:06d}/{path}" for place, path in enumerate(paths))
    for index, (start, stop) in enumerate(((0, 2), (2, 6))):
        content = {
            "layout": {"process": index, "processes": 2, "mesh": MESH},
            "shapes": {kernel: [6, 4], bias: [4]},
            "run": run,
            "t5gemma": None,
        }
        arrays = {f"{kernel}[{start}:{stop},0:4]": factor * KERNEL[start:stop], f"{bias}[0:4]": BIAS}
        resume_files.write_step(folder / f"process_{index}_of_2", step, content, arrays)
    return kernel, bias


def saved(folder, index):
    path = folder / f"process_{index}_of_2" / "step_00000008"
    return SavedArrays(path, resume_files.verified(path))


def test_region_is_read_from_whichever_shards_it_lies_in(tmp_path):
    kernel, bias = write(tmp_path)
    for index in (0, 1):
        arrays = saved(tmp_path, index)
        assert arrays.names(("model",)) == [kernel, bias]
        assert arrays.shape(kernel) == (6, 4)
        for box in (((0, 2), (0, 4)), ((0, 1), (1, 3)), ((3, 6), (2, 4)), ((1, 5), (0, 3)), ((0, 6), (0, 4))):
            expected = KERNEL[tuple(slice(*ends) for ends in box)]
            np.testing.assert_array_equal(arrays.read(kernel, box), expected)
        np.testing.assert_array_equal(arrays.read(kernel), KERNEL)
        assert arrays.read(bias).dtype == BIAS.dtype


def test_what_lies_in_the_own_part_needs_no_other(tmp_path):
    kernel, bias = write(tmp_path)
    shutil.rmtree(tmp_path / "process_1_of_2")
    arrays = saved(tmp_path, 0)
    np.testing.assert_array_equal(arrays.read(kernel, ((1, 2), (0, 4))), KERNEL[1:2])
    np.testing.assert_array_equal(arrays.read(bias), BIAS)
    with pytest.raises(CheckpointError, match=r"\[0:3,0:4\] lies in no part .*2 process\(es\).*processes \[0\]\. Use"):
        arrays.read(kernel, ((0, 3), (0, 4)))


def test_other_part_is_checked_before_it_is_read(tmp_path):
    kernel, _ = write(tmp_path)
    file = tmp_path / "process_1_of_2" / "step_00000008" / resume_files.ARRAYS_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"process_1_of_2/step_00000008/training\.safetensors is damaged"):
        saved(tmp_path, 0).read(kernel)


def test_model_is_filled_from_parts_and_with_the_mean_of_several(tmp_path):
    write(tmp_path)
    write(tmp_path, step=16, factor=2.0)
    model = small_model()
    model.variables[1].assign(ops.zeros(4))
    for arguments, factor in (({}, 2), ({"step": 8}, 1), ({"last": 2}, 1.5), ({"step": 8, "last": 1}, 1)):
        load_training_weights(model, tmp_path, **arguments)
        np.testing.assert_array_equal(ops.convert_to_numpy(model.variables[0]), factor * KERNEL)
        np.testing.assert_array_equal(ops.convert_to_numpy(model.variables[1]), BIAS.astype("float32"))
    with pytest.raises(CheckpointError, match=r"steps \[8, 16\]. Received: step=8, last=2"):
        load_training_weights(model, tmp_path, step=8, last=2)
    with pytest.raises(CheckpointError, match="another model"):
        load_training_weights(small_model(5), tmp_path)


def test_step_of_which_a_part_is_missing_does_not_count(tmp_path):
    write(tmp_path)
    write(tmp_path, step=16, factor=2.0)
    shutil.rmtree(tmp_path / "process_1_of_2" / "step_00000016")
    load_training_weights(model := small_model(), tmp_path)
    np.testing.assert_array_equal(ops.convert_to_numpy(model.variables[0]), KERNEL)


def test_weights_are_not_put_together_without_the_folder_of_each_process(tmp_path):
    write(tmp_path)
    with pytest.raises(CheckpointError, match=r"process_0_of_2/step_00000008 does not hold the weights of a plain"):
        training_weights(tmp_path)
    shutil.rmtree(tmp_path / "process_0_of_2")
    with pytest.raises(CheckpointError, match="of 2 processes, and of their folders only process_1_of_2"):
        training_weights(tmp_path)


def test_run_of_several_processes_is_refused_by_one(tmp_path):
    write(tmp_path)
    checkpoint = TrainingCheckpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"of 2 process\(es\), and this is one of 1.*Start 2.*load_training_w"):
        small_model().fit(
            checkpoint.data(batches()), steps_per_epoch=1, callbacks=[checkpoint], verbose=0, shuffle=False
        )


def test_mean_of_checkpoints_of_one_process_is_that_of_its_arrays(tmp_path):
    checkpoint = TrainingCheckpoint(tmp_path, save_every=1)
    small_model().fit(checkpoint.data(batches()), steps_per_epoch=2, callbacks=[checkpoint], verbose=0, shuffle=False)
    kernels = []
    for arguments in ({"step": 1}, {"step": 2}, {"last": 2}):
        load_training_weights(model := small_model(), tmp_path, **arguments)
        kernels.append(ops.convert_to_numpy(model.variables[0]))
    assert np.abs(kernels[0] - kernels[1]).max() > 0
    np.testing.assert_allclose(kernels[2], (kernels[0] + kernels[1]) / 2, rtol=1e-6)
