"""A run that early stopping ended is over; one that was interrupted stops where it would have stopped."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
from helpers.resumed import TOLERANCE, Interrupt, Stop, assert_same, dense, rows, wait_for_writers

from keras_t5gemma.training.checkpointing import step_folder as resume_files
from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint

# Of each epoch; the best is the second, and patience is over with the fourth.
LOSSES = [5.0, 3.0, 4.0, 4.0, 4.0, 4.0]


class Losses(keras.callbacks.Callback):
    """Says what the loss of each epoch was, and counts them."""

    epochs = 0

    def on_epoch_end(self, epoch, logs=None):
        self.epochs += 1
        logs["loss"] = LOSSES[epoch]


class StopAt(keras.callbacks.Callback):
    """Sets `stop_training` in the middle of training, as a limit of time would."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.place = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.place:
            self.model.stop_training = True


def run(folder, *more, epochs=6, best=True, dtype=None, steps_per_epoch=4, early=None, before=(), **kwargs):
    """`(model, epochs, early stopping)` of a run with epochs of four batches."""
    model, losses = dense(dtype=dtype), Losses()
    early = keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=best) if early is None else early
    checkpoint = TrainingCheckpoint(folder, save_every=3, **kwargs)
    model.fit(
        checkpoint.data(rows(16)),
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        verbose=0,
        shuffle=False,
        callbacks=[*before, losses, early, *more, checkpoint],
    )
    return model, losses.epochs, early


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("steps_per_epoch", [4, None])
def test_run_that_early_stopping_ended_trains_no_more_and_has_the_weights_it_ended_with(
    tmp_path, best, steps_per_epoch
):
    kwargs = {"best": best, "steps_per_epoch": steps_per_epoch}
    first, epochs, _ = run(tmp_path, **kwargs)
    assert epochs == 4
    second, _, _ = run(tmp_path / "two", epochs=2 if best else 4, **kwargs)
    for pair in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_allclose(*pair, rtol=0, atol=TOLERANCE)  # of the second epoch, the best one
    for total in (6, 5, 9):
        with pytest.warns(UserWarning, match=r"is over: EarlyStopping on loss ended it after 4 epochs\. Nothing is tr"):
            again, epochs, _ = run(tmp_path, epochs=total, **kwargs)
        assert epochs == 0
        assert_same(again, first)


def test_run_that_has_all_its_epochs_says_so_and_trains_no_more(tmp_path):
    first, epochs, _ = run(tmp_path, epochs=2)
    assert epochs == 2
    with pytest.warns(UserWarning, match=r"is over: it has trained 2 epochs\. Nothing is trained; more `epochs`"):
        again, epochs, _ = run(tmp_path, epochs=2)
    assert epochs == 0
    assert_same(again, first)


def test_run_that_early_stopping_ended_goes_on_if_told_to(tmp_path):
    run(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, epochs, early = run(tmp_path, continue_stopped=True)
    assert epochs == 2  # 4.0 is no better than 3.0 either, and patience is over again
    assert (early.best, early.best_epoch, early.stopped_epoch) == (3.0, 1, 5)
    whole, _, _ = run(tmp_path / "whole", early=keras.callbacks.EarlyStopping("loss", patience=9), best=False)
    assert resume_files.steps_in(tmp_path)[-1].name == resume_files.steps_in(tmp_path / "whole")[-1].name
    again, epochs, _ = run(tmp_path, early=keras.callbacks.EarlyStopping("loss"), continue_stopped=True)
    assert epochs == 0
    assert_same(again, whole)


@pytest.mark.parametrize(
    ("kind", "place"),
    [(Interrupt, (5,)), (Interrupt, (9,)), (Interrupt, (13,))]
    + [(StopAt, place) for place in ((0, 3), (2, 1), (2, 3), (3, 1))],
    ids=["error in 1", "error in 2", "error in 3", "end of 0", "within 2", "end of 2", "within 3"],
)
@pytest.mark.parametrize("steps_per_epoch", [4, None])
def test_interrupted_run_stops_with_the_epoch_that_it_would_have_stopped_with(tmp_path, kind, place, steps_per_epoch):
    whole, _, expected = run(tmp_path / "whole", steps_per_epoch=steps_per_epoch)
    folder = tmp_path / "run"
    with pytest.raises(Stop) if kind is Interrupt else contextlib.nullcontext():
        run(folder, steps_per_epoch=steps_per_epoch, before=[kind(*place)])
    wait_for_writers()
    model, epochs, early = run(folder, steps_per_epoch=steps_per_epoch)
    assert 1 <= epochs <= 4
    assert (early.stopped_epoch, early.best_epoch, early.best) == (3, 1, 3.0)
    assert early.wait == expected.wait
    assert_same(model, whole)


def test_interruption_within_an_epoch_is_no_early_stop_whatever_the_epoch_so_far_looks_like(tmp_path):
    # Patience is over with the part of the epoch that was trained on, too.
    run(tmp_path, before=[StopAt(3, 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, epochs, early = run(tmp_path)
    assert (epochs, early.stopped_epoch) == (1, 3)


def test_finished_run_with_more_epochs_goes_on_from_the_last_weights_not_the_best(tmp_path):
    first, _, _ = run(tmp_path, epochs=3)
    again, epochs, _ = run(tmp_path, epochs=3)
    assert epochs == 0
    assert_same(again, first)
    early = keras.callbacks.EarlyStopping("loss", patience=9)
    model, _, _ = run(tmp_path, epochs=6, early=early)
    whole, _, _ = run(tmp_path / "whole", early=keras.callbacks.EarlyStopping("loss", patience=9))
    assert_same(model, whole)


def test_best_weights_in_bfloat16_come_back(tmp_path):
    first, _, _ = run(tmp_path, dtype="bfloat16")
    with pytest.warns(UserWarning, match="is over"):
        again, _, _ = run(tmp_path, dtype="bfloat16")
    assert_same(again, first)


def test_plateau_and_best_of_other_callbacks_come_back(tmp_path):
    def callbacks():
        plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=2, factor=0.5)
        path = tmp_path / "best.weights.h5"
        return [
            plateau,
            keras.callbacks.ModelCheckpoint(path, monitor="loss", save_best_only=True, save_weights_only=True),
        ]

    def rates(folder, epochs, restart_at=None):
        seen = []
        watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["learning_rate"]))
        early = keras.callbacks.EarlyStopping("loss", patience=9)
        for total in (restart_at, epochs) if restart_at else (epochs,):
            path = tmp_path / "best.weights.h5"
            path.unlink(missing_ok=True)
            run(folder, *callbacks(), watch, epochs=total, early=early)
        return seen, path.exists()

    expected, _ = rates(tmp_path / "whole", 6)
    found, saved_again = rates(tmp_path / "run", 6, restart_at=3)
    assert found == expected
    assert expected[-1] < expected[0]
    assert not saved_again  # no epoch after the third is better than the second


def test_early_stopping_after_the_checkpoint_is_refused(tmp_path):
    checkpoint = TrainingCheckpoint(tmp_path)
    callbacks = [checkpoint, keras.callbacks.EarlyStopping("loss")]
    with pytest.raises(ValueError, match=r"TrainingCheckpoint after EarlyStopping.*\['TrainingCheckpoint', 'EarlySto"):
        dense().fit(checkpoint.data(rows()), steps_per_epoch=2, shuffle=False, verbose=0, callbacks=callbacks)


def test_metric_that_never_came_is_no_state(tmp_path):
    early = keras.callbacks.EarlyStopping("val_loss")
    with pytest.warns(UserWarning, match="val_loss"):
        run(tmp_path, early=early, epochs=2)
    content = resume_files.read_state(resume_files.steps_in(tmp_path)[-1])
    assert content["ended_by"] is None
    assert content["callbacks"][0]["state"]["best"] is None
    assert np.isfinite(float(content["epoch"]))
