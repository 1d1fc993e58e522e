"""`TrainingCheckpoint(best=...)`: the checkpoint of the best epoch stays, and its weights are found again."""

import keras
import numpy as np
import pytest
from helpers.resumed import Interrupt, Stop, dense, rows, wait_for_writers, weights

from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.training.checkpointing import step_folder
from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint
from keras_t5gemma.training.checkpointing.weights import load_training_weights, training_weights

# Of each epoch, larger being better: the best is the third, then the sixth.
SCORES = [1.0, np.nan, 5.0, 5.0, 4.0, 6.0]


class Scores(keras.callbacks.Callback):
    """Says what the score of each epoch was, and keeps the weights of each."""

    def __init__(self, name="val_score", scores=SCORES):
        super().__init__()
        self.name, self.scores, self.weights = name, scores, {}

    def on_epoch_end(self, epoch, logs=None):
        if epoch < len(self.scores):
            logs[self.name] = self.scores[epoch]
        self.weights[epoch] = weights(self.model)


def run(folder, *before, epochs=5, scores=None, best="val_score", **kwargs):
    model, scores = dense(), scores or Scores()
    checkpoint = TrainingCheckpoint(folder, save_every=2, keep=1, best=best, **kwargs)
    data = checkpoint.data(rows(16))  # four batches an epoch
    callbacks = [*before, scores, checkpoint]
    model.fit(data, epochs=epochs, steps_per_epoch=4, verbose=0, shuffle=False, callbacks=callbacks)
    return scores


def numbers(folder):
    return [step_folder.step_of(path) for path in step_folder.steps_in(folder)]


def assert_best(folder, expected):
    model = dense()
    load_training_weights(model, folder, best=True)
    trained = len(model.trainable_variables)
    for found, value in zip(weights(model)[:trained], expected[:trained], strict=False):
        np.testing.assert_array_equal(found, value)


def test_best_checkpoint_stays_beside_the_newest_and_is_loaded(tmp_path):
    scores = run(tmp_path)
    assert numbers(tmp_path) == [12, 20]
    assert_best(tmp_path, scores.weights[2])
    run(tmp_path, epochs=6)
    assert numbers(tmp_path) == [24]


def test_smallest_loss_is_the_best_unless_told_otherwise(tmp_path):
    losses = [3.0, 2.0, 4.0, 5.0]
    for mode, expected in (("auto", 8), ("min", 8), ("max", 16)):
        run(tmp_path / mode, epochs=4, scores=Scores("val_loss", losses), best="val_loss", mode=mode)
        assert numbers(tmp_path / mode)[0] == expected


@pytest.mark.parametrize("batches", [14, 17, 19])
def test_interrupted_run_knows_the_best_value_of_before(tmp_path, batches):
    with pytest.raises(Stop):
        run(tmp_path, Interrupt(batches))
    wait_for_writers()
    assert 12 in numbers(tmp_path)
    run(tmp_path)
    assert numbers(tmp_path) == [12, 20]


def test_run_with_another_metric_begins_to_compare_anew(tmp_path):
    run(tmp_path)
    run(tmp_path, epochs=6, scores=Scores("val_other", [0, 0, 0, 0, 0, -1.0]), best="val_other")
    assert numbers(tmp_path) == [24]


def test_metric_that_never_came_and_runs_without_one_are_said(tmp_path):
    with pytest.warns(UserWarning, match=r"`best='val_score'` is not in the logs of this epoch.*\['loss', 'mae'\]"):
        run(tmp_path, epochs=1, scores=Scores(scores=[]))
    with pytest.raises(CheckpointError, match=r"step_00000004 records no best epoch\. Train with"):
        load_training_weights(dense(), tmp_path, best=True)
    with pytest.raises(CheckpointError, match="records no best epoch"):
        training_weights(tmp_path, best=True)
    with pytest.raises(ValueError, match=r"`best` must be False beside `step` and `last`. Received: step=4"):
        load_training_weights(dense(), tmp_path, 4, best=True)
    with pytest.raises(ValueError, match=r"`last` must be None beside best=True"):
        training_weights(tmp_path, 1, best=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"best": 3}, "`best` must be a name in the logs"), ({"best": "x", "mode": "mix"}, "`mode` must be one of auto")],
)
def test_arguments_that_are_none_are_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        TrainingCheckpoint(tmp_path, **options)
