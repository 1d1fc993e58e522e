"""A batch run in parts makes the step of the whole batch, whatever its rows weigh."""

import keras
import numpy as np
import pytest
from helpers.one_step import assert_same_step, batch, language_model, take_steps, weights_of
from keras import ops

from keras_t5gemma.training.callbacks.cross_attention_warmup import CrossAttentionWarmup
from keras_t5gemma.training.losses.cross_entropy import VocabularyCrossEntropy
from keras_t5gemma.training.steps.accumulation import Accumulation

ROWS = 6


@pytest.fixture(scope="module")
def whole():
    lm = language_model()
    before, data = weights_of(lm), batch(lm, ROWS)
    assert len(set(data[2].sum(axis=1))) == ROWS  # so that a plain mean over parts would be another
    found = take_steps(lm, data, 2)
    assert all(np.abs(value - before[path]).max() > 1e-4 for path, value in found[1].items())
    return found


def test_step_in_parts_is_that_of_the_whole_batch(whole, monkeypatch):
    lm = language_model(accumulation_steps=3)
    seen, hidden_states = [], lm.hidden_states

    def spied(x, training=None):
        if training:
            seen.append(x["decoder_token_ids"].shape[0])
        return hidden_states(x, training=training)

    monkeypatch.setattr(lm, "hidden_states", spied)
    assert_same_step(take_steps(lm, batch(lm, ROWS), 2), whole)
    assert int(lm.optimizer.iterations) == 2
    # The model never sees more than a part; what is compiled is a loop over them, not all of them at once.
    assert set(seen) == {2}
    assert len(seen) <= (6 if keras.config.backend() == "torch" else 2)


def test_metric_of_the_users_own_is_that_of_the_whole_batch(whole):
    metric = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    lm = language_model(weighted_metrics=[metric], accumulation_steps=3)
    assert_same_step(take_steps(lm, batch(lm, ROWS), 2), whole)


LOSSES = {
    "by weight": VocabularyCrossEntropy(z_loss=0.01),
    "by elements": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "mean": keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean"),
    "sum": VocabularyCrossEntropy(reduction="sum"),
}


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_of_parts_times_their_shares_add_up_to_the_loss(loss, weighted):
    generator = np.random.default_rng(0)
    y, logits = generator.integers(0, 9, (8, 5)), generator.standard_normal((8, 5, 9)).astype("float32")
    weights = generator.integers(0, 4, (8, 5)).astype("float32") if weighted else None
    count, (x, y_parts, weight_parts), shares = Accumulation(4, loss).cut((logits, y, weights))
    assert count == 4
    parts = [loss(y_parts[i], x[i], None if weights is None else weight_parts[i]) * shares[i] for i in range(4)]
    assert float(sum(parts)) == pytest.approx(float(loss(y, logits, weights)), rel=1e-5)


def test_part_takes_every_nth_row_of_all_there_is():
    rows = np.arange(6)
    x = {"ids": rows[:, None], "none": None}
    y = {"labels": rows, "top": np.stack([rows, -rows], axis=1)}
    count, (x, y, weights), _ = Accumulation(2, "mse").cut((x, y))
    assert (count, weights, x["none"]) == (2, None, None)
    np.testing.assert_array_equal(ops.convert_to_numpy(x["ids"])[..., 0], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(ops.convert_to_numpy(y["labels"]), [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(ops.convert_to_numpy(y["top"])[1], [[1, -1], [3, -3], [5, -5]])


@pytest.mark.parametrize(("rows", "steps", "expected"), [(8, 4, 4), (6, 4, 6), (9, 2, 3), (7, 3, 7), (2, 4, 2)])
def test_rows_that_do_not_divide_are_cut_into_more_parts_not_larger_ones(rows, steps, expected):
    accumulation = Accumulation(steps, "mse")
    assert accumulation.cut((np.zeros((rows, 2)),))[0] == expected
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        # `fit` traces a step for any number of rows.
        count = tf.function(lambda x: accumulation.cut((x,))[0], input_signature=[tf.TensorSpec((None, 2))])
        assert int(count(tf.zeros((rows, 2)))) == expected


def test_warm_up_in_parts_trains_cross_attention_alone():
    lm = language_model(accumulation_steps=3)
    before, (x, y, weights) = weights_of(lm), batch(lm, ROWS)
    lm.fit(x, y, sample_weight=weights, batch_size=ROWS, callbacks=[CrossAttentionWarmup(steps=9)], verbose=0)
    moved = {path for path, value in weights_of(lm).items() if np.any(value != before[path])}
    assert moved == {path for path in before if "cross_attention" in path}


def test_steps_come_back_with_what_else_compile_was_told():
    lm, again = language_model(accumulation_steps=3), language_model()
    again.compile_from_config(lm.get_compile_config())
    assert again.get_compile_config()["accumulation_steps"] == 3


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_steps_that_are_no_positive_integer_are_refused(steps):
    with pytest.raises(ValueError, match="`accumulation_steps` must be a positive integer"):
        Accumulation(steps, "mse")


@pytest.mark.parametrize(
    "loss", [None, ["mse", "mse"], keras.losses.MeanSquaredError(reduction=None)], ids=["none", "two", "unreduced"]
)
def test_loss_whose_parts_do_not_add_up_is_refused(loss):
    Accumulation(1, loss)
    with pytest.raises(ValueError, match="accumulation_steps=2 needs a single loss"):
        Accumulation(2, loss)
