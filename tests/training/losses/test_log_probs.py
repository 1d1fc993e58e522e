"""Log-probabilities in chunks against plain mathematics in float64: values, and gradients of functions of sums."""

import keras
import numpy as np
import pytest
from helpers.gradients import gradients
from keras import ops

from keras_t5gemma.training.losses.log_probs import target_log_probs

R, T, D, V = 3, 10, 8, 57


@pytest.fixture(scope="module")
def arrays():
    generator = np.random.default_rng(0)
    hidden, table = (generator.standard_normal(shape).astype("float32") for shape in ((R, T, D), (V, D)))
    return hidden, table, generator.integers(0, V, (R, T)).astype("int32")


def exact(hidden, table, labels, cap):
    """`(log-probabilities [R, T], softmax [R, T, V], slope of the cap [R, T, V])` in float64."""
    raw = np.einsum("rtd,vd->rtv", hidden.astype("float64"), table.astype("float64"))
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    slope = np.ones_like(logits) if cap is None else 1 - (logits / cap) ** 2
    return np.take_along_axis(log_softmax, labels[..., None], -1)[..., 0], np.exp(log_softmax), slope


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("tokens", [1, 4, 99])
def test_log_probs_and_gradients_are_by_definition_whatever_the_chunks(arrays, tokens, cap):
    hidden, table, labels = arrays
    options = {"cap": cap, "chunk_bytes": 4 * V * R * tokens}
    log_probs, softmax, slope = exact(hidden, table, labels, cap)
    got = ops.convert_to_numpy(target_log_probs(*map(ops.convert_to_tensor, arrays), **options))
    np.testing.assert_allclose(got, log_probs, atol=1e-5)

    def loss(hidden, table):
        # As in a preference: what an answer's tokens weigh depends on the sum over all of them.
        return ops.sum(ops.softplus(0.1 * ops.sum(target_log_probs(hidden, table, labels, **options), axis=1)))

    weights = 0.1 / (1 + np.exp(-0.1 * log_probs.sum(axis=1)))
    of_logits = weights[:, None, None] * (np.eye(V)[labels] - softmax) * slope
    expected = np.einsum("rtv,vd->rtd", of_logits, table), np.einsum("rtv,rtd->vd", of_logits, hidden)
    for found, gradient in zip(gradients(loss, hidden, table), expected, strict=True):
        np.testing.assert_allclose(found, gradient, atol=1e-5)


def test_gradient_of_a_frozen_table_is_zero_and_that_of_hidden_states_the_same(arrays):
    hidden, table, labels = arrays

    def loss_with(train_table):
        return lambda hidden, table: ops.sum(target_log_probs(hidden, table, labels, train_table=train_table) ** 2)

    (frozen, nothing), (trained, _) = (gradients(loss_with(value), hidden, table) for value in (False, True))
    np.testing.assert_allclose(frozen, trained, atol=1e-5)
    assert not nothing.any()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends know all shapes in a step")
def test_shapes_that_are_unknown_when_a_step_is_traced_change_nothing(arrays):
    import tensorflow as tf

    hidden, table, labels = map(tf.constant, arrays)

    def gradient(hidden, labels):
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            loss = tf.reduce_sum(target_log_probs(hidden, table, labels) ** 2)
        return loss, tape.gradient(loss, hidden)

    signature = [tf.TensorSpec([None, None, D]), tf.TensorSpec([None, None], tf.int32)]
    for found, expected in zip(tf.function(gradient, signature)(hidden, labels), gradient(hidden, labels), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_bfloat16_hidden_states_give_float32_log_probs_and_gradients_of_their_own_dtypes(arrays):
    hidden, table, labels = arrays
    rounded = ops.cast(hidden, "bfloat16")
    expected, *_ = exact(ops.convert_to_numpy(ops.cast(rounded, "float32")), table, labels, None)
    got = target_log_probs(rounded, ops.convert_to_tensor(table), labels)
    assert keras.backend.standardize_dtype(got.dtype) == "float32"
    np.testing.assert_allclose(ops.convert_to_numpy(got), expected, atol=0.1)  # products round the table too

    def loss_in(dtype):
        return lambda hidden, table: ops.sum(target_log_probs(ops.cast(hidden, dtype), table, labels) ** 2)

    pairs = (gradients(loss_in(dtype), hidden, table) for dtype in ("bfloat16", "float32"))
    for found, gradient in zip(*pairs, strict=True):
        assert np.linalg.norm(found - gradient) < 0.02 * np.linalg.norm(gradient)
