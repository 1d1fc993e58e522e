"""Attention in blocks of queries: the numbers of the plain one, without its memory."""

import contextlib

import keras
import numpy as np
import pytest
from helpers import attention_cases
from helpers.attention_cases import CASES, OTHERS, SEGMENTS, SIZE, both, inputs
from keras import ops

from keras_t5gemma.kernels.attention import masks, reference
from keras_t5gemma.kernels.attention.dispatch import PACKAGE, attention
from keras_t5gemma.kernels.attention.masks import BlockMask, attention_mask, visible_keys
from keras_t5gemma.kernels.attention.reference import attend
from keras_t5gemma.kernels.choose import implementation, using


def at_once(query, key, value, mask, cap, dtype):
    """As a model attends where the sequences are short: on JAX with a gradient of its own."""
    kind = {"query_start": mask.query_start, "causal": mask.causal, "window": mask.window}
    visible = attention_mask(mask.query_segments, mask.key_segments, **kind)
    return attention(query, key, value, visible, cap=cap, dtype=dtype)


def blocks_of(query, key, value, mask, cap, dtype):
    return implementation(PACKAGE).in_blocks(query, key, value, mask, cap=cap, dtype=dtype)


@pytest.mark.parametrize("way", [blocks_of, at_once])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_are_those_of_the_plain_one(case, way):
    if way is at_once and keras.config.backend() != "jax":
        pytest.skip("The plain one is at work itself.")
    found, expected = both(case, way)
    # Sums come in another order, and products of half precision may be rounded before they are summed.
    rounding = {"bfloat16": 1e-2, "float16": 1e-3}.get(case.get("dtype"), 1e-6)
    for got, value, tolerance in zip(found, expected, [rounding] + 3 * [3 * rounding], strict=True):
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance * np.abs(value).max())


def of_any_length(query, key, value, mask, cap, dtype):
    """In a program that TensorFlow traces for any batch and any length: it finds its blocks when it runs."""
    import tensorflow as tf

    kind = {"query_start": mask.query_start, "causal": mask.causal, "window": mask.window}
    heads = query.shape[2] * query.shape[3]

    def spec(x, *unknown):
        return tf.TensorSpec([None if axis in unknown else size for axis, size in enumerate(x.shape)], x.dtype)

    @tf.function(
        input_signature=[
            spec(query, 0, 1),
            *(spec(x, 0, 2) for x in (key, value)),
            *(spec(x, 0, 1) for x in (mask.query_segments, mask.key_segments)),
        ]
    )
    def run(query, key, value, *segments):
        visible = visible_keys(heads, *segments, **kind)
        assert ops.is_tensor(visible.block)
        return attention(query, key, value, visible, cap=cap, dtype=dtype)

    return run(query, key, value, mask.query_segments, mask.key_segments)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="only TensorFlow traces without knowing lengths")
@pytest.mark.parametrize(
    ("name", "shortest"), [*((name, 5) for name in CASES), ("more keys than queries", 1), ("bfloat16", 100)]
)
def test_output_and_gradients_of_unknown_lengths_are_those_of_the_plain_one(name, shortest, monkeypatch):
    """In blocks of five queries at most, of one, and in one block of all."""
    case = CASES[name]
    monkeypatch.setattr(masks, "BLOCK_BYTES_ON_CPU", 1)
    monkeypatch.setattr(masks, "SHORTEST_BLOCK", shortest)
    found, expected = both(case, of_any_length)
    rounding = {"bfloat16": 1e-2, "float16": 1e-3}.get(case.get("dtype"), 1e-6)
    for got, value, tolerance in zip(found, expected, [rounding] + 3 * [3 * rounding], strict=True):
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance * np.abs(value).max())


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="only TensorFlow traces without knowing lengths")
def test_gradients_of_a_single_kv_head_and_unknown_lengths_are_those_of_the_plain_one(monkeypatch):
    monkeypatch.setattr(attention_cases, "KV_HEADS", 1)
    test_output_and_gradients_of_unknown_lengths_are_those_of_the_plain_one(
        "a window shorter than a block", 5, monkeypatch
    )


def no_gradients():
    """Where PyTorch is told that none is wanted; other backends are never told."""
    if keras.config.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


@pytest.mark.parametrize("cap", [None, 2.0])
def test_output_where_no_gradient_is_wanted_is_that_where_one_is(cap):
    segments = [ops.convert_to_tensor(array) for array in (OTHERS, SEGMENTS)]
    query, key, value, _ = inputs(7, 13, "float32", 3.0)
    options = {"cap": cap, "dtype": "float32"}
    whole, blocks = attention_mask(*segments, window=4), BlockMask(3, *segments, window=4)
    expected = ops.convert_to_numpy(attend(query, key, value, whole, **options))
    with no_gradients():
        for got in (attention(query, key, value, visible, **options) for visible in (whole, blocks)):
            np.testing.assert_allclose(ops.convert_to_numpy(got), expected, rtol=1e-6, atol=1e-6)


def test_query_that_sees_nothing_gives_zero_and_no_gradient():
    (output, query_gradient, *_), _ = both({"keys": OTHERS}, blocks_of)
    for row, query in ((0, 0), (0, 8), (1, 0), (1, 12)):
        assert (output[row, query] == 0).all()
        assert (query_gradient[row, query] == 0).all()


@pytest.mark.skipif(keras.config.backend() != "jax", reason="only on JAX is attention's gradient this package's")
@pytest.mark.parametrize("way", [blocks_of, at_once])
def test_nothing_of_the_size_of_the_logits_is_kept_for_the_gradient(way):
    import jax

    segments = ops.ones((2, 64), dtype="int32")
    query, key, value, _ = inputs(64, 64, "float32", 3.0)
    mask = BlockMask(16, segments, segments)
    kept = jax.tree.leaves(jax.vjp(lambda *qkv: way(*qkv, mask, 2.0, "float32"), query, key, value)[1])
    assert {x.shape for x in (query, key, value)} <= {x.shape for x in kept}
    # A query's places of a mask are as many as its keys; its logits are as many times its heads.
    assert max(x.size for x in kept) <= 2 * 64 * 64


@pytest.mark.parametrize(("causal", "seen"), [(False, 4 + 2 * 2), (True, 4 + 2)])
def test_block_of_a_window_takes_only_the_keys_within_it(causal, seen, monkeypatch):
    shapes, in_all, matmul = [], [], reference.matmul

    def recorded(left, right):
        (shapes if left.shape[3] == 4 else in_all).append((*left.shape[3:], right.shape[3]))
        return matmul(left, right)

    monkeypatch.setattr(reference, "matmul", recorded)
    both({"window": 3, "causal": causal}, blocks_of)
    # Of keys with queries, and of weights with values.
    assert set(shapes) == {(4, SIZE, seen), (4, seen, SIZE)}
    assert set(in_all) == {(13, SIZE, 13), (13, 13, SIZE)}  # the plain one's


def test_blocks_are_as_even_as_they_can_be_and_hold_a_quarter_of_the_logits_where_four_fit(monkeypatch):
    monkeypatch.setattr(masks, "SHORTEST_BLOCK", 2)
    segments = ops.ones((2, 15), dtype="int32")
    monkeypatch.setattr(masks, "BLOCK_BYTES_ON_CPU", 4 * 2 * 3 * 15 * 4)
    assert visible_keys(3, segments, segments).block == 4
    assert visible_keys(6, segments, segments).block == 2
    assert visible_keys(12, segments, segments).block == 2  # the shortest
    assert visible_keys(3, segments[:1], segments[:1]).block == 8
    assert visible_keys(3, segments[:, :4], segments).shape == (2, 4, 15)  # they fit


def test_any_implementation_can_be_asked_for_by_name():
    query, key, value, _ = inputs(13, 13, "float32", 3.0)
    segments = ops.convert_to_tensor(SEGMENTS)
    both_masks = BlockMask(4, segments, segments, window=4), attention_mask(segments, segments, window=4)

    def outputs():
        options = {"cap": 2.0, "dtype": "float32"}
        return [ops.convert_to_numpy(attention(query, key, value, mask, **options)) for mask in both_masks]

    assert implementation(PACKAGE).__name__ == f"{PACKAGE}.{keras.config.backend()}"
    expected = outputs()
    with using(PACKAGE, "reference"):
        assert implementation(PACKAGE) is reference
        found = outputs()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[0], found[1])
