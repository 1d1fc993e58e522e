"""`TrainingCheckpoint` on rows in memory: each epoch in an order of its own, which a run that goes on finds again."""

import grain
import keras
import numpy as np
import pytest
from helpers.one_step import language_model
from helpers.resumed import Interrupt, Stop, assert_same, wait_for_writers

from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint

ROWS = 10
X = {"first": np.arange(4.0 * ROWS).reshape(ROWS, 4), "second": np.ones((ROWS, 4))}
Y, WEIGHTS = np.arange(2.0 * ROWS).reshape(ROWS, 2), np.arange(float(ROWS))


def run(folder, callbacks=(), epochs=3, seed=1, verbose=0, **kwargs):
    """`(model, dataset)` after epochs of 4, 4 and 2 rows."""
    keras.utils.set_random_seed(0)
    inputs = {name: keras.Input((4,), name=name) for name in X}
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.add(list(inputs.values()))))
    model.compile("sgd", "mse", run_eagerly=True)
    checkpoint = TrainingCheckpoint(folder, save_every=2)
    data = checkpoint.data(X, Y, WEIGHTS, batch_size=4, seed=seed)
    model.fit(data, epochs=epochs, verbose=verbose, shuffle=False, callbacks=[*callbacks, checkpoint], **kwargs)
    return model, data


@pytest.mark.parametrize("batches", [3, 5])
@pytest.mark.parametrize("steps_per_epoch", [None, 3])
def test_interrupted_run_on_rows_ends_with_the_weights_of_one_that_was_not(tmp_path, batches, steps_per_epoch):
    whole, _ = run(tmp_path / "whole", steps_per_epoch=steps_per_epoch)
    with pytest.raises(Stop):
        run(tmp_path / "run", [Interrupt(batches)], steps_per_epoch=steps_per_epoch)
    wait_for_writers()
    model, _ = run(tmp_path / "run", steps_per_epoch=steps_per_epoch)
    assert_same(model, whole)


@pytest.mark.parametrize("seed", [0, 1, None])
def test_each_epoch_has_every_row_once_in_the_order_of_its_seed(tmp_path, seed):
    data = TrainingCheckpoint(tmp_path).data(X, Y, WEIGHTS, batch_size=4, seed=seed)
    orders = [[int(i) for _, _, weight in list(data.source[k : k + 3]) for i in weight] for k in (0, 3)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(ROWS))
    assert (orders[0] == orders[1] == list(range(ROWS))) == (seed is None)
    again = TrainingCheckpoint(tmp_path).data(X, Y, WEIGHTS, batch_size=4, seed=seed)
    assert [weight.tolist() for _, _, weight in again] == [weight.tolist() for _, _, weight in data]


def test_other_rows_or_another_seed_are_refused(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, [Interrupt(3)])
    wait_for_writers()
    with pytest.raises(ValueError, match="Batch 2 of the dataset is not the one the run was trained on"):
        run(tmp_path, seed=2)


def test_texts_and_rows_of_unequal_length_come_as_lists(tmp_path):
    x = {"encoder_text": ["a", "b", "c"], "decoder_text": ("x", "y", "z")}
    batches = list(TrainingCheckpoint(tmp_path).data(x, batch_size=2, seed=None))
    assert batches[0] == {"encoder_text": ["a", "b"], "decoder_text": ["x", "y"]}
    ids = {"encoder_token_ids": [[5, 6, 7], [8]], "decoder_token_ids": np.array([[2, 3], [2, 4]])}
    x, y = next(iter(TrainingCheckpoint(tmp_path).data(ids, [[3, 1], [4, 1]], batch_size=2, seed=None)))
    assert x["encoder_token_ids"] == [[5, 6, 7], [8]]
    assert y == [[3, 1], [4, 1]]


@pytest.mark.parametrize(
    ("x", "options", "said"),
    [
        ({"encoder_text": ["a", "b"], "decoder_text": ["c"]}, {}, r"x\['decoder_text'\]\": 1"),
        ({"encoder_text": []}, {}, "at least one"),
        ({"encoder_text": np.array("a")}, {}, "at least one"),
        ({}, {}, "at least one"),
        ({"encoder_text": ["a"]}, {"batch_size": 0}, "`batch_size` must be a positive integer"),
        ({"encoder_text": ["a"]}, {"seed": "x"}, "`seed`"),
        (grain.MapDataset.range(3), {"y": [1, 2, 3]}, "`y` and `sample_weight` must be None beside a dataset"),
        (iter([1]), {}, r"`dataset` must be a Grain dataset.*or a dict of rows in memory.*Received: list_iterator"),
    ],
)
def test_what_is_no_data_to_go_on_with_is_named(tmp_path, x, options, said):
    with pytest.raises(ValueError, match=said):
        TrainingCheckpoint(tmp_path).data(x, **options)


@pytest.mark.parametrize("steps_per_epoch", [None, 3])
def test_progress_bar_of_an_interrupted_epoch_counts_the_batches_that_remain(tmp_path, steps_per_epoch, capsys):
    with pytest.raises(Stop):
        run(tmp_path, [Interrupt(5)], steps_per_epoch=steps_per_epoch)
    wait_for_writers()
    capsys.readouterr()
    run(tmp_path, verbose=2, steps_per_epoch=steps_per_epoch)
    bars = [line.split(" - ")[0] for line in capsys.readouterr().out.splitlines() if "/step" in line]
    assert bars == ["2/2", "3/3"]  # the last checkpoint is after the first batch of the second epoch


def test_run_of_a_language_model_on_ids_of_unequal_length_goes_on(tmp_path):
    x = {"encoder_token_ids": [[5, 6], [7], [8, 9, 10], [3]], "decoder_token_ids": [[2, 3, 4], [2, 5], [2, 9], [2, 3]]}

    def trained(folder, callbacks=(), x=x):
        lm = language_model(run_eagerly=True)
        checkpoint = TrainingCheckpoint(folder, save_every=1)
        data = checkpoint.data(x, batch_size=2)
        lm.fit(data, epochs=2, verbose=0, callbacks=[*callbacks, checkpoint])
        return lm

    with pytest.raises(Stop):
        trained(tmp_path / "run", [Interrupt(3)])
    wait_for_writers()
    assert_same(trained(tmp_path / "run"), trained(tmp_path / "whole"))
    longer = x | {"decoder_token_ids": [[*row, 4] for row in x["decoder_token_ids"]]}
    with pytest.raises(ValueError, match=r"decoder_token_ids/0 is int64 \[\d\], and was int64 \[\d\]"):
        trained(tmp_path / "run", x=longer)
