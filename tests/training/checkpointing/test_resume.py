"""Runs go on from their checkpoints to the bit, whatever killed them, and refuse what is not theirs."""

import random
import re
import shutil

import grain
import keras
import numpy as np
import pytest
from helpers.resumed import (
    Interrupt,
    Stop,
    assert_same,
    dense,
    fit,
    interrupted,
    rows,
    wait_for_writers,
    weights,
)

from keras_t5gemma.checkpoints.convert import average_checkpoints
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.config import StackConfig
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.training.checkpointing import step_folder as resume_files
from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint
from keras_t5gemma.training.checkpointing.weights import load_training_weights, training_weights
from keras_t5gemma.training.optimizers.factory import optimizer as kt_optimizer


def names(folder):
    return [path.name for path in resume_files.steps_in(folder)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {}),
        ("adamw", {"moments_dtype": "bfloat16"}),
        ("adamw", {"master_weights": True}),
        ("adafactor", {}),
        ("muon", {}),
    ],
)
def test_run_of_bfloat16_weights_goes_on_with_its_rounding_and_the_rate_that_was_set(tmp_path, name, options):
    def make():
        return dense(kt_optimizer(name, learning_rate=0.05, steps=16, warmup_steps=0, **options), dtype="bfloat16")

    def once(epoch, rate):
        return 0.01 if epoch == 0 else rate

    callbacks = [keras.callbacks.LearningRateScheduler(once)]
    whole, model = make(), make()
    fit(whole, tmp_path / "whole", callbacks=callbacks)
    with pytest.raises(Stop):
        fit(make(), tmp_path / "run", callbacks=[*callbacks, Interrupt(13)])
    wait_for_writers()
    fit(model, tmp_path / "run", callbacks=callbacks)
    assert_same(model, whole)
    assert_same(model.optimizer, whole.optimizer)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)


@pytest.mark.parametrize(("batches", "steps_per_epoch"), [(5, 8), (17, None), (25, None)])
def test_run_that_goes_on_logs_each_epoch_from_there_as_the_uninterrupted(tmp_path, batches, steps_per_epoch):
    shape = dict(epochs=4, steps_per_epoch=steps_per_epoch, validation_data=rows(8), validation_steps=2)
    dataset = rows(32)
    expected = fit(whole := dense(), tmp_path / "whole", dataset, **shape).history
    interrupted(tmp_path / "killed", batches, dataset=dataset, **shape)
    found = fit(model := dense(), tmp_path / "killed", dataset, **shape).history
    assert_same(model, whole)
    epochs = 4 - batches // 4 * 4 // 8
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == pytest.approx(expected[name][-epochs:], abs=1e-6), name


def test_first_epoch_after_a_restart_is_what_was_left_of_it(tmp_path):
    interrupted(tmp_path, 5)
    steps = []
    count = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: steps.append([epoch, 0]),
        on_train_batch_end=lambda batch, logs: steps[-1].__setitem__(1, steps[-1][1] + 1),
    )
    fit(dense(), tmp_path, callbacks=[count])
    assert steps == [[0, 4], [1, 8]]


def test_finished_run_started_again_trains_no_more_and_more_epochs_go_on(tmp_path):
    fit(first := dense(), tmp_path)
    fit(model := dense(), tmp_path)
    assert_same(model, first)
    fit(model, tmp_path, epochs=3)
    fit(whole := dense(), tmp_path / "whole", epochs=3)
    assert_same(model, whole)


def test_global_random_states_are_restored(tmp_path):
    keras.utils.set_random_seed(7)
    draws = []

    def draw(batch, logs):
        draws.append((random.random(), np.random.random(), float(keras.random.uniform(()))))

    fit(dense(), tmp_path, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=draw)])
    for path in resume_files.steps_in(tmp_path)[-2:]:
        shutil.rmtree(path)
    expected, draws = draws, []
    fit(dense(), tmp_path, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=draw)])
    assert draws == expected[-len(draws) :]
    assert len(draws) == 8


def test_training_that_is_stopped_goes_on_where_it_stopped(tmp_path):
    class Early(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 2

    fit(dense(), tmp_path, callbacks=[Early()])
    assert names(tmp_path) == ["step_00000003"]
    fit(model := dense(), tmp_path)
    fit(whole := dense(), tmp_path / "whole")
    assert_same(model, whole)


def test_early_stopping_is_heard_after_an_epoch_that_the_callback_ended(tmp_path):
    class Early(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    history = fit(dense(), tmp_path, callbacks=[Early()], steps_per_epoch=None)
    assert len(history.epoch) == 1


@pytest.mark.parametrize("steps_per_epoch", [8, None])
def test_run_with_steps_per_execution_goes_on(tmp_path, steps_per_epoch):
    def make():
        # Keras has only 1 on PyTorch.
        return dense(run_eagerly=False, steps_per_execution=1 if keras.config.backend() == "torch" else 3)

    shape = dict(epochs=2, steps_per_epoch=steps_per_epoch)
    fit(whole := make(), tmp_path / "whole", rows(32), **shape)
    interrupted(tmp_path / "killed", 2, make, dataset=rows(32), **shape)
    fit(model := make(), tmp_path / "killed", rows(32), **shape)
    assert_same(model, whole)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    fit(dense(), tmp_path, save_every=2, keep=2)
    assert names(tmp_path) == ["step_00000014", "step_00000016"]
    fit(dense(), tmp_path / "all", save_every=4, keep=None)
    assert names(tmp_path / "all") == [f"step_{step:08d}" for step in (4, 8, 12, 16)]


def test_checkpoint_of_another_model_is_refused(tmp_path):
    interrupted(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"step_00000004 is of another model: where it has .*\[4, 8\].*\[4, 9\]"):
        fit(dense(units=9), tmp_path)


def test_checkpoint_of_another_optimizer_is_refused(tmp_path):
    interrupted(tmp_path, 5)
    with pytest.raises(CheckpointError, match="another optimizer: class_name was Adam, and is SGD"):
        fit(dense("sgd"), tmp_path)
    with pytest.raises(CheckpointError, match=r"config.beta_2 was 0.999, and is 0.9\."):
        fit(dense(keras.optimizers.Adam(beta_2=0.9)), tmp_path)


@pytest.mark.parametrize(
    ("dataset", "what"),
    [
        (rows(seed=5), "checksum is"),
        (rows(batch=2), r"0 is float32 \[2, 4\], and was float32 \[4, 4\]"),
        (rows().to_iter_dataset(), "checksum is"),
    ],
)
def test_checkpoint_of_other_data_is_refused(tmp_path, dataset, what):
    interrupted(tmp_path, 5)
    with pytest.raises(ValueError, match=rf"(?s){what}.*the same texts, tokenizer, objective, batch_size and seed"):
        fit(dense(), tmp_path, dataset)


def test_checkpoint_of_another_steps_per_epoch_is_refused(tmp_path):
    interrupted(tmp_path, 5)
    with pytest.raises(ValueError, match=r"`steps_per_epoch` was 8 in the run of .*step_00000004, and is 6"):
        fit(dense(), tmp_path, steps_per_epoch=6)


@pytest.mark.parametrize("file", [resume_files.ARRAYS_FILE, resume_files.STATE_FILE])
def test_damaged_checkpoint_is_named_with_one_that_is_good(tmp_path, file):
    fit(dense(), tmp_path)
    path = tmp_path / "step_00000016" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{file} is .*{re.escape(str(tmp_path))}/step_00000012 is good: remove"):
        fit(dense(), tmp_path)


def test_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="`folder`: no checkpoints can be written to"):
        fit(dense(), tmp_path / "file" / "run")


def test_loss_that_is_nan_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    def poisoned(i):
        x = np.full(4, np.nan if i >= 24 else 1.0, "float32")
        return x, x[:2]

    dataset = grain.MapDataset.range(64).map(poisoned).batch(4)
    with pytest.raises(FloatingPointError, match=r"loss is nan at batch 7, number 7 of epoch 0.*step_00000004\."):
        fit(dense(), tmp_path, dataset)
    checkpoint = TrainingCheckpoint(tmp_path / "late", save_every=4, stop_on_nan=False)
    with pytest.raises(FloatingPointError, match=r"holds infinities or NaNs.*after batch 8.*step_00000004\."):
        dense().fit(checkpoint.data(dataset), steps_per_epoch=16, shuffle=False, verbose=0, callbacks=[checkpoint])
    assert names(tmp_path / "late") == ["step_00000004"]


def test_error_of_the_writing_thread_is_raised_at_the_next_save(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume_files, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step_00000004 could not be written: No space left"):
        fit(dense(), tmp_path)
    assert names(tmp_path) == []


def test_data_that_are_not_the_checkpoints_are_refused(tmp_path):
    checkpoint = TrainingCheckpoint(tmp_path)
    with pytest.raises(ValueError, match=r"pass `checkpoint\.data"):
        dense().fit(rows(), steps_per_epoch=2, shuffle=False, verbose=0, callbacks=[checkpoint])
    with pytest.raises(ValueError, match="`dataset` must be a Grain dataset"):
        checkpoint.data([1, 2])


@pytest.mark.parametrize("arguments", [dict(save_every=0), dict(save_every=2.5), dict(keep=0)])
def test_arguments_out_of_range_are_named(tmp_path, arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be a positive integer"):
        TrainingCheckpoint(tmp_path, **arguments)


class Drift(keras.callbacks.Callback):
    """Stands in for the training of a T5Gemma, which would take long to compile: other weights after each batch."""

    def on_train_batch_end(self, batch, logs=None):
        for variable in self.model.backbone.weights:
            variable.assign(variable + 0.25)


class WithT5Gemma(keras.Model):
    def __init__(self, dtype, lora):
        super().__init__()
        stack = dict(num_layers=1, intermediate_dim=8, num_query_heads=2, num_key_value_heads=1, head_dim=4)
        sizes = StackConfig(hidden_dim=8, **stack), StackConfig(hidden_dim=4, **stack)
        self.backbone = T5GemmaBackbone(*sizes, vocabulary_size=64, dtype=dtype)
        if lora:
            self.backbone.enable_lora(2)
        self.backbone.trainable = False
        self.head = keras.layers.Dense(2)

    def call(self, x):
        return self.head(x)


def with_t5gemma(dtype=None, lora=False):
    model = WithT5Gemma(dtype, lora)
    model(np.zeros((1, 4), "float32"))
    model.compile("adam", "mse", run_eagerly=True)
    return model


def test_saved_weights_of_a_t5gemma_are_its_checkpoints_and_have_a_mean(tmp_path):
    model = with_t5gemma("bfloat16")
    fit(model, tmp_path / "run", callbacks=[Drift()], save_every=1, epochs=1, steps_per_epoch=3)
    folders = training_weights(tmp_path / "run", last=3)
    assert [path.parent.name for path in folders] == [f"step_{step:08d}" for step in (1, 2, 3)]
    backbone = T5GemmaBackbone.from_preset(str(folders[-1]), dtype="bfloat16")
    for found, expected in zip(weights(backbone), weights(model.backbone), strict=True):
        np.testing.assert_array_equal(found, expected)
    average_checkpoints(folders, tmp_path / "mean", dtype="float32")
    mean = T5GemmaBackbone.from_preset(str(tmp_path / "mean"))
    each = [T5GemmaBackbone.from_preset(str(path)) for path in folders]
    for found, *parts in zip(weights(mean), *map(weights, each), strict=True):
        np.testing.assert_allclose(found, np.mean(parts, axis=0), rtol=1e-5, atol=1e-7)
    with pytest.raises(CheckpointError, match="holds 3 training checkpoint"):
        training_weights(tmp_path / "run", last=4)


def test_saved_weights_with_lora_fill_a_model_to_export(tmp_path):
    model, other = with_t5gemma(lora=True), with_t5gemma(lora=True)
    fit(model, tmp_path, callbacks=[Drift()], save_every=1, epochs=1, steps_per_epoch=3)
    load_training_weights(other, tmp_path)
    for found, expected in zip(weights(other), weights(model), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(CheckpointError, match=r"weights of a plain T5Gemma.*load_training_weights"):
        training_weights(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        load_training_weights(with_t5gemma(), tmp_path)
    with pytest.raises(CheckpointError, match=r"another model's config: lora was .* \.\.\., and is None") as raised:
        fit(with_t5gemma(), tmp_path, epochs=1, steps_per_epoch=3)
    assert len(str(raised.value)) < 600  # the layers with LoRA are cut short
    with pytest.raises(CheckpointError, match=r"steps \[1, 2, 3\]. Received: step=9"):
        load_training_weights(other, tmp_path, step=9)
