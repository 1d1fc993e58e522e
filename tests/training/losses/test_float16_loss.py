"""The chunked loss in float16: gradients that are smaller than float16's smallest number are not lost on the way."""

import keras
import numpy as np
import pytest
from helpers.gradients import gradients
from helpers.one_step import batch, language_model, take_steps, weights_of
from keras import ops

from keras_t5gemma.training.losses.cross_entropy import VocabularyCrossEntropy

WIDTH, CAP = 8, 30.0
LOSS_SCALE = 2.0**15  # where `keras.optimizers.LossScaleOptimizer` begins
LARGEST_ERROR = 0.005


def arrays(pieces, rows, length, width=WIDTH):
    """Hidden states, a table and labels of which a few are frequent, as in text."""
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((rows, length, width)).astype("float32")
    table = (2.3 * width**-0.5 * generator.standard_normal((pieces, width))).astype("float32")
    return hidden, table, (generator.zipf(1.3, (rows, length)) % pieces).astype("int32")


def errors(pieces, rows, length, weights=None, width=WIDTH):
    """How far float16's gradients are from float32's, to their norm: of hidden states and of the table."""
    hidden, table, labels = arrays(pieces, rows, length, width)

    def loss_in(dtype):
        def loss(hidden, table):
            value, *_ = VocabularyCrossEntropy().from_hidden_states(
                ops.cast(hidden, dtype), table, labels, weights, cap=CAP
            )
            return value * LOSS_SCALE

        return gradients(loss, hidden, table)

    pairs = zip(loss_in("float16"), loss_in("float32"), strict=True)
    return [np.linalg.norm(found - expected) / np.linalg.norm(expected) for found, expected in pairs]


def test_gradients_of_a_large_vocabulary_in_float16_are_float32s_to_half_a_percent():
    """benchmarks/float16_loss.py has Gemma's 256,000 pieces and 4,096 tokens."""
    assert max(errors(32_000, 4, 256)) < LARGEST_ERROR


@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e3])
def test_gradients_in_float16_do_not_depend_on_the_scale_of_the_weights(weight):
    assert max(errors(4_096, 4, 64, np.full((4, 64), weight, "float32"))) < LARGEST_ERROR


def test_gradients_of_many_tokens_with_one_label_and_large_hidden_states_stay_finite():
    """Their sum over tokens is the largest that there is."""
    hidden, table, labels = arrays(64, 4, 512)

    def loss(hidden, table):
        states = ops.cast(100 * ops.abs(hidden), "float16")
        return VocabularyCrossEntropy().from_hidden_states(states, table, np.zeros_like(labels), cap=None)[0]

    of_hidden, of_table = gradients(loss, hidden, -ops.convert_to_numpy(ops.abs(table)))
    assert np.isfinite(of_hidden).all()
    assert np.isfinite(of_table).all()
    assert np.abs(of_table).max() > 1  # in the units of the mean loss: float16 held 32,768 times as much


def test_fit_in_mixed_float16_is_near_float32():
    results = {}
    for dtype in ("float32", "mixed_float16"):
        lm = language_model(dtype=dtype, optimizer=keras.optimizers.SGD(0.05))
        start = weights_of(lm)
        results[dtype] = take_steps(lm, batch(lm), 3)
    (logs, weights), (expected_logs, expected_weights) = results["mixed_float16"], results["float32"]
    assert logs["loss"] == pytest.approx(expected_logs["loss"], rel=LARGEST_ERROR)
    moved = {path: expected_weights[path] - start[path] for path in start}
    apart = {path: weights[path] - expected_weights[path] for path in start}
    total = np.sqrt(sum(np.sum(np.square(x)) for x in moved.values()))
    assert np.sqrt(sum(np.sum(np.square(x)) for x in apart.values())) / total < 0.02
