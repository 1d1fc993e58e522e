"""Products and norms in the forms that a backend is fast with: numbers and gradients of the plain ones."""

import keras
import numpy as np
import pytest
from gradients import gradients
from keras import ops

from keras_t5gemma.layers import feed_forward, norm, projection


def assert_same(function, plain, *arrays):
    """Values of two functions, and the gradients of their sums of squares."""
    tensors = [ops.convert_to_tensor(x) for x in arrays]
    found = [
        [ops.convert_to_numpy(of(*tensors)), *gradients(lambda *xs, of=of: ops.sum(ops.square(of(*xs))), *arrays)]
        for of in (function, plain)
    ]
    for got, expected in zip(*found, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (2, 8), (1, 17)])
def test_product_with_a_table(batch, length):
    def plain(x, table):
        return ops.einsum("btd,vd->btv", x, table)

    assert_same(projection._product, plain, draw(batch, length, 12), draw(40, 12, seed=1))


@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="its products are no faster with the table first")
def test_few_rows_go_behind_the_table_and_many_before(monkeypatch):
    calls, table_first = [], projection._table_first
    monkeypatch.setattr(projection, "_table_first", lambda *args: calls.append(args) or table_first(*args))
    table = ops.convert_to_tensor(draw(40, 12))
    for length in (1, 16, 17):
        projection._product(ops.convert_to_tensor(draw(1, length, 12)), table)
    assert [x.shape[1] for x, _ in calls] == [1, 16]


def test_norm():
    layer = norm.RMSNorm(1e-6)
    layer.build((None, None, 12))

    def plain(x, scale):
        return x / ops.sqrt(ops.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + scale)

    assert_same(lambda x, scale: norm.fused(layer._normalise, x, scale), plain, draw(2, 5, 12), draw(12, seed=1))


def test_gated_product():
    def plain(gate, up):
        return 0.5 * gate * (1 + ops.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up

    def gated(gate, up):
        return feed_forward.fused(feed_forward._gated, gate, up)

    assert_same(gated, plain, draw(10, 12), draw(10, 12, seed=1))
