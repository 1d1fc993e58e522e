"""Products and norms in the forms that a backend is fast with: numbers and gradients of the plain ones."""

import keras
import numpy as np
import pytest
from helpers.gradients import gradients
from helpers.peers import tiny_config
from keras import ops

from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.matmul import PACKAGE, reference
from keras_t5gemma.layers import feed_forward, norm
from keras_t5gemma.layers.initialization import dense

PRODUCTS = implementation(PACKAGE)
# Rows that are multiplied with the table on the left; of half precision on JAX, too.
FEW = {"jax": [1, 3, 4, 16, 2], "torch": [1, 3]}


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


def integers(*shape, seed=0):
    """Numbers so small that bfloat16 holds their products' sums."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype("float32")


@pytest.mark.parametrize(("batch", "length", "size"), [(1, 1, 40), (3, 1, 40), (2, 8, 40), (2, 8, 41), (1, 65, 40)])
def test_product_with_a_table(batch, length, size):
    def plain(x, table):
        return ops.einsum("btd,vd->btv", x, table)

    assert_same(PRODUCTS.table_product, plain, draw(batch, length, 12), draw(size, 12, seed=1))


@pytest.mark.parametrize("length", [1, 17])
def test_product_with_a_table_in_bfloat16(length):
    x, table = integers(1, length, 12), integers(40, 12, seed=1)
    product = PRODUCTS.table_product(*(ops.convert_to_tensor(array, "bfloat16") for array in (x, table)))
    assert keras.backend.standardize_dtype(product.dtype) == "bfloat16"
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(product, "float32")), x @ table.T)


@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="its products are no faster with the table first")
def test_few_rows_go_behind_the_table(monkeypatch):
    """Which lengths of one row the form for many rows is asked for."""
    seen, module = [], PRODUCTS
    where, name = {"jax": (reference, "table_product"), "torch": (ops, "matmul")}[keras.config.backend()]
    plain = getattr(where, name)
    monkeypatch.setattr(where, name, lambda x, table: seen.append((x.shape[1], str(x.dtype))) or plain(x, table))
    for length, dtype in [*((length, "float32") for length in (1, 3, 4, 16, 17)), (2, "float16")]:
        module.table_product(*(ops.convert_to_tensor(draw(*shape), dtype) for shape in ((1, length, 12), (40, 12))))
    lengths = [length for length, _ in seen if length != 40]
    assert [x for x in (1, 3, 4, 16, 17, 2) if x not in lengths] == FEW[keras.config.backend()]


def test_product_of_some_positions_with_a_table():
    x, table = draw(2, 9, 12), draw(40, 12, seed=1)
    for places in (np.s_[:, 2:4], np.s_[:, ::2], np.s_[:, -1:], np.s_[:, :, :6]):
        x_part, width = x[places], x[places].shape[2]
        product = PRODUCTS.table_product(ops.convert_to_tensor(x)[places], ops.convert_to_tensor(table)[:, :width])
        np.testing.assert_allclose(ops.convert_to_numpy(product), x_part @ table[:, :width].T, atol=1e-5)


def test_norm():
    layer = norm.RMSNorm(1e-6)
    layer.build((None, None, 12))

    def plain(x, scale):
        return x / ops.sqrt(ops.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + scale)

    assert_same(lambda x, scale: norm.recomputed(layer._normalise, x, scale), plain, draw(2, 5, 12), draw(12, seed=1))


def test_gated_product():
    def plain(gate, up):
        return 0.5 * gate * (1 + ops.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up

    def gated(gate, up):
        return feed_forward.recomputed(feed_forward._gated, gate, up)

    assert_same(gated, plain, draw(10, 12), draw(10, 12, seed=1))


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "float32"])
def test_dense_layer(policy, rows):
    layer = dense(8, "query", tiny_config().decoder, policy)
    layer.build((None, 12))
    x, kernel = integers(rows, 12), integers(12, 8, seed=1)
    layer.set_weights([kernel])
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(y, "float32")), x @ kernel)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="other backends multiply bfloat16 as it comes")
@pytest.mark.parametrize("rows", [1, 6])
def test_quick_product_of_bfloat16(rows):
    import jax

    x, kernel, upstream = integers(rows, 12), integers(12, 8, seed=1), integers(rows, 8, seed=2)

    def function(x, kernel):
        product = PRODUCTS._dense_product(ops.cast(x, "bfloat16"), ops.cast(kernel, "bfloat16"))
        assert product.dtype == "bfloat16"
        return ops.sum(ops.cast(product, "float32") * upstream)

    for found in (gradients(function, x, kernel), gradients(jax.jit(function), x, kernel)):
        np.testing.assert_array_equal(found[0], upstream @ kernel.T)
        np.testing.assert_array_equal(found[1], x.T @ upstream)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="other backends multiply bfloat16 as it comes")
def test_gradients_are_those_of_keras_layer(monkeypatch):
    import jax

    layer = dense(512, "query", tiny_config().decoder, "mixed_bfloat16")
    layer.build((None, 512))

    def total(kernel, x):
        with keras.StatelessScope([(layer.kernel, kernel)]):
            return ops.sum(ops.square(ops.cast(layer(x), "float32")))

    gradient = jax.grad(total)
    # Not compiled: JAX would take the second program from its cache, whatever has changed.
    arrays = ops.convert_to_tensor(draw(512, 512)), ops.convert_to_tensor(draw(256, 512))
    calls, dense_product = [], PRODUCTS._dense_product
    monkeypatch.setattr(PRODUCTS, "_dense_product", lambda *args: calls.append(args) or dense_product(*args))
    found = ops.convert_to_numpy(gradient(*arrays))
    assert len(calls) == 1
    monkeypatch.setattr(PRODUCTS, "has_quick_kernel", lambda x: False)
    expected = ops.convert_to_numpy(gradient(*arrays))
    assert len(calls) == 1
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-2 * np.abs(expected).max())


@pytest.mark.skipif(keras.config.backend() != "jax", reason="other backends have quick products of one row")
def test_row_that_a_gpu_has_twice_comes_once(monkeypatch):
    layer = dense(8, "query", tiny_config().decoder, "bfloat16")
    layer.build((None, 12))
    layer.kernel.assign(integers(12, 8, seed=1))
    monkeypatch.setattr(PRODUCTS, "has_quick_kernel", lambda x: False)
    monkeypatch.setattr(PRODUCTS, "jax_on_gpu", lambda: True)
    seen, call = [], keras.layers.Dense.call
    monkeypatch.setattr(
        keras.layers.Dense, "call", lambda self, x, **kw: seen.append(x.shape[0]) or call(self, x, **kw)
    )
    for rows in (1, 3):
        x = integers(rows, 12)
        np.testing.assert_array_equal(np.asarray(layer(x), "float32"), x @ integers(12, 8, seed=1))
    assert seen == [2, 3]
