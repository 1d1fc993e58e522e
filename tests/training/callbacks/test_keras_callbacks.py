"""Keras's own callbacks, with this package's optimizer and beside `TrainingCheckpoint`."""

import csv
import importlib.util
import json

import keras
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.resumed import Interrupt, Stop, assert_same, dense, wait_for_writers
from helpers.resumed import fit as fit_dense
from helpers.tiny import loud_backbone

import keras_t5gemma as kt

CONFIG = tiny_config(num_layers=1, vocabulary_size=64)
BATCHES = 2
X = {name: np.concatenate([values[:2]] * 2) for name, values in loud_inputs(CONFIG).items()}
EPOCHS = 2


@pytest.fixture(scope="module")
def lm():
    """One model for all: each test trains it on from where the last one left it."""
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    lm.compile(optimizer=kt.optimizer(learning_rate=1e-3, warmup_steps=0))
    return lm


def fit(lm, folder, *callbacks, epochs=EPOCHS, **kwargs):
    checkpoint = kt.TrainingCheckpoint(folder / "run", save_every=BATCHES)
    data = checkpoint.data(X, batch_size=2)
    validation = {name: values[:2] for name, values in X.items()}
    return lm.fit(
        data, epochs=epochs, validation_data=validation, verbose=0, callbacks=[*callbacks, checkpoint], **kwargs
    )


def rate(lm):
    return float(keras.ops.convert_to_numpy(lm.optimizer.learning_rate))


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("best_only", [True, False])
def test_model_checkpoint_saves_what_loads_again(lm, tmp_path, weights_only, best_only):
    path = tmp_path / ("lm.weights.h5" if weights_only else "lm.keras")
    best = {"monitor": "val_loss", "save_best_only": best_only, "initial_value_threshold": 0.0 if best_only else None}
    fit(lm, tmp_path, keras.callbacks.ModelCheckpoint(path, save_weights_only=weights_only, **best))
    assert path.exists() != best_only  # no loss is below 0
    if best_only:
        best["initial_value_threshold"] = None
        fit(lm, tmp_path / "2", keras.callbacks.ModelCheckpoint(path, save_weights_only=weights_only, **best), epochs=1)
    trained = lm.get_weights()
    if weights_only:
        lm.set_weights([np.zeros_like(weight) for weight in trained])
        lm.load_weights(path)
    loaded = lm if weights_only else keras.models.load_model(path)
    for found, expected in zip(loaded.get_weights(), trained, strict=True):
        np.testing.assert_array_equal(found, expected)
    if not weights_only:
        assert int(loaded.optimizer.iterations) == int(lm.optimizer.iterations) > 0


def test_csv_logger_and_tensorboard_write_each_epoch(lm, tmp_path):
    callbacks = [keras.callbacks.CSVLogger(tmp_path / "log.csv")]
    if importlib.util.find_spec("tensorboard") and importlib.util.find_spec("tensorflow"):
        callbacks.append(keras.callbacks.TensorBoard(tmp_path / "board", write_graph=False, histogram_freq=1))
    history = fit(lm, tmp_path, *callbacks).history
    with (tmp_path / "log.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in logged] == pytest.approx(history["val_loss"])
    assert len(callbacks) == 1 or list((tmp_path / "board").rglob("events*"))


def test_rates_of_schedulers_and_plateaus_are_those_trained_with(lm, tmp_path):
    before = rate(lm)
    history = fit(lm, tmp_path, keras.callbacks.LearningRateScheduler(lambda epoch, rate: 1e-3 / (epoch + 1)))
    assert history.history["learning_rate"] == pytest.approx([1e-3, 5e-4])
    assert rate(lm) == pytest.approx(5e-4)
    # Nothing is ever better by so much.
    plateau = keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, factor=0.5, min_delta=9.0)
    fit(lm, tmp_path / "plateau", plateau, epochs=3)
    assert rate(lm) == pytest.approx(5e-4 / 4)
    assert before > 0


def test_lambda_callbacks_read_and_use_the_model(lm, tmp_path):
    seen = []

    def ask(epoch, logs):
        seen.append((epoch, sorted(logs), np.isfinite(lm.evaluate(X, batch_size=2, verbose=0)).all()))

    fit(lm, tmp_path, keras.callbacks.LambdaCallback(on_epoch_end=ask))
    assert seen == [(epoch, ["accuracy", "loss", "val_accuracy", "val_loss"], True) for epoch in range(EPOCHS)]


class Poison(keras.callbacks.Callback):
    """Makes a weight NaN in an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            weight = self.model.backbone.weights[0]
            weight.assign(weight * np.nan)


@pytest.fixture
def poisoned(lm):
    """The model, whose weights and moments are put back."""
    variables = lm.variables + lm.optimizer.variables
    before = [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]
    yield lm
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)


def test_nan_ends_training_at_once_and_the_checkpoint_keeps_what_was_good(poisoned, tmp_path):
    with pytest.raises(FloatingPointError, match=r"The loss is nan at batch 3.*step_00000002"):
        fit(poisoned, tmp_path, Poison(1), keras.callbacks.TerminateOnNaN())
    logs = poisoned.fit(X, batch_size=2, epochs=3, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert len(logs.epoch) <= 1


def test_backup_and_restore_goes_on_with_the_epoch_after_the_last_one(lm, tmp_path):
    backup = tmp_path / "backup"

    def stop(epoch, logs):
        raise Stop

    with pytest.raises(Stop):
        lm.fit(
            X,
            batch_size=2,
            epochs=3,
            verbose=0,
            callbacks=[
                keras.callbacks.BackupAndRestore(backup),
                keras.callbacks.LambdaCallback(on_epoch_end=stop),
            ],
        )
    assert json.loads((backup / "training_metadata.json").read_text())["epoch"] == 1
    steps = int(lm.optimizer.iterations)
    history = lm.fit(X, batch_size=2, epochs=3, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(backup)])
    assert history.epoch == [1, 2]
    assert int(lm.optimizer.iterations) == steps + 2 * BATCHES
    assert lm.fit(X, batch_size=2, epochs=2, verbose=0).epoch == [0, 1]
    with pytest.raises(ValueError, match=r"BackupAndRestore beside TrainingCheckpoint.*Leave one of them out"):
        fit(lm, tmp_path, keras.callbacks.BackupAndRestore(backup))


def test_run_that_goes_on_trains_the_epochs_that_are_left(lm, tmp_path):
    assert fit(lm, tmp_path).epoch == [0, 1]
    assert fit(lm, tmp_path, epochs=3).epoch == [2]


def test_averages_are_swapped_in_for_validation_and_out_again(lm, tmp_path):
    with pytest.raises(ValueError, match="use_ema=True"):
        fit(lm, tmp_path, keras.callbacks.SwapEMAWeights())
    ema = kt.T5GemmaSeq2SeqLM(lm.backbone)
    ema.compile(optimizer=kt.optimizer(learning_rate=1e-3, warmup_steps=0, use_ema=True, ema_momentum=0.5))
    fit(ema, tmp_path / "ema", keras.callbacks.SwapEMAWeights())
    average = [np.array(keras.ops.convert_to_numpy(v)) for v in ema.optimizer._model_variables_moving_average]
    assert all(np.isfinite(values).all() for values in average)
    for variable, values in zip(ema.trainable_variables, average, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), values, atol=1e-6)


@pytest.mark.parametrize("batches", [6, 11])
def test_interrupted_run_with_averages_swapped_each_epoch_goes_on(tmp_path, batches):
    def make():
        return dense(kt.optimizer(learning_rate=0.05, warmup_steps=0, use_ema=True, ema_momentum=0.5))

    def swap():
        return [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]

    fit_dense(whole := make(), tmp_path / "whole", callbacks=swap(), epochs=3, steps_per_epoch=4)
    with pytest.raises(Stop):
        fit_dense(make(), tmp_path / "run", callbacks=[Interrupt(batches), *swap()], epochs=3, steps_per_epoch=4)
    wait_for_writers()
    fit_dense(model := make(), tmp_path / "run", callbacks=swap(), epochs=3, steps_per_epoch=4)
    assert_same(model, whole)
