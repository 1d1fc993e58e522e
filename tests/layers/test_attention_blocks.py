"""Attention in blocks of queries: the numbers of the plain one, without its memory."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_t5gemma.layers import masks
from keras_t5gemma.layers.attention import attend
from keras_t5gemma.layers.attention_blocks import in_blocks
from keras_t5gemma.layers.masks import BlockMask, attention_mask, visible_keys

BATCH, KV_HEADS, GROUPS, SIZE = 2, 2, 3, 4
# Packed from three examples, with padding on the left of one row and on the right of the other.
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0, 0]], "int32")
OTHERS = np.array([[1, 1, 1, 1, 3, 3, 3], [0, 2, 2, 2, 2, 2, 0]], "int32")  # no 2 in one row, no 1 in the other

# Block of 4: 13 queries are three blocks and one query more.
CASES = {
    "all keys": {},
    "no later keys, no soft cap": {"causal": True, "cap": None},
    "a window shorter than a block": {"window": 2},
    "a causal window of several blocks": {"window": 5, "causal": True, "block": 2},
    "a window wider than the sequence, blocks of one query": {"window": 20, "block": 1},
    "more queries than keys": {"keys": OTHERS},
    "more keys than queries": {"queries": OTHERS, "keys": SEGMENTS},
    "queries within a cache": {"queries": SEGMENTS[:, 4:10], "keys": SEGMENTS, "start": 4, "causal": True, "window": 3},
    "bfloat16": {"dtype": "bfloat16", "window": 2},
    "float16, out of its range": {"dtype": "float16", "window": 2, "scale": 200.0},
}


def inputs(queries, keys, dtype, scale):
    """Query, key, value and the weights of a sum of the output, which makes a gradient."""
    generator = np.random.default_rng(0)
    shapes = [(queries, KV_HEADS, GROUPS, SIZE), (keys, KV_HEADS, SIZE), (keys, KV_HEADS, SIZE)]
    arrays = [scale * generator.standard_normal((BATCH, *shape)) for shape in (*shapes, shapes[0])]
    arrays[2:] = [array / scale for array in arrays[2:]]
    return [ops.cast(ops.convert_to_tensor(array.astype("float32")), dtype) for array in arrays]


def output_and_gradients(attention, query, key, value, upstream):
    """float32 arrays: what attention gives, and the gradients of its product with `upstream`."""
    tensors = (query, key, value)
    if keras.config.backend() == "jax":
        import jax

        @jax.jit
        def run(*tensors):
            output, backward = jax.vjp(attention, *tensors)
            return output, *backward(upstream)

        results = run(*tensors)
    elif keras.config.backend() == "torch":
        for tensor in tensors:
            tensor.requires_grad_()
        output = attention(*tensors)
        output.backward(upstream)
        results = output, *(tensor.grad for tensor in tensors)
    else:
        import tensorflow as tf

        @tf.function
        def run(*tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                output = attention(*tensors)
            return output, *tape.gradient(output, tensors, upstream)

        results = run(*tensors)
    return [ops.convert_to_numpy(ops.cast(result, "float32")) for result in results]


def both(case, of_attend=lambda attend: attend):
    """`(in blocks, plain)` of a case, each the output and three gradients."""
    case = {"queries": SEGMENTS, "keys": SEGMENTS, "block": 4, "dtype": "float32", "scale": 3.0, "cap": 2.0, **case}
    start = case.get("start", 0)
    # In a compiled decoding step it is a tensor.
    start = start and ops.convert_to_tensor(start)
    kind = {"query_start": start, "causal": case.get("causal", False), "window": case.get("window")}
    segments = [ops.convert_to_tensor(case[name]) for name in ("queries", "keys")]
    tensors = inputs(*(s.shape[1] for s in segments), case["dtype"], case["scale"])
    plain = functools.partial(attend, cap=case["cap"], dtype=case["dtype"])
    whole, blocks = attention_mask(*segments, **kind), BlockMask(case["block"], *segments, **kind)
    found = output_and_gradients(lambda *qkv: in_blocks(of_attend(plain), *qkv, blocks), *tensors)
    return found, output_and_gradients(lambda *qkv: plain(*qkv, whole), *map(ops.stop_gradient, tensors))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_are_those_of_the_plain_one(case):
    found, expected = both(case)
    # Sums come in another order, and products of half precision may be rounded before they are summed.
    rounding = {"bfloat16": 1e-2, "float16": 1e-3}.get(case.get("dtype"), 1e-6)
    for got, value, tolerance in zip(found, expected, [rounding] + 3 * [3 * rounding], strict=True):
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance * np.abs(value).max())


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
    plain = functools.partial(attend, cap=cap, dtype="float32")
    whole, blocks = attention_mask(*segments, window=4), BlockMask(3, *segments, window=4)
    expected = ops.convert_to_numpy(plain(query, key, value, whole))
    with no_gradients():
        for got in (plain(query, key, value, whole), in_blocks(plain, query, key, value, blocks)):
            np.testing.assert_allclose(ops.convert_to_numpy(got), expected, rtol=1e-6, atol=1e-6)


def test_query_that_sees_nothing_gives_zero_and_no_gradient():
    (output, query_gradient, *_), _ = both({"keys": OTHERS})
    for row, query in ((0, 0), (0, 8), (1, 0), (1, 12)):
        assert (output[row, query] == 0).all()
        assert (query_gradient[row, query] == 0).all()


@pytest.mark.parametrize(("causal", "seen"), [(False, 4 + 2 * 2), (True, 4 + 2)])
def test_block_of_a_window_takes_only_the_keys_within_it(causal, seen):
    shapes = []

    def recorded(attend):
        def call(query, key, value, visible):
            shapes.append((query.shape[1], key.shape[1], value.shape[1], *visible.shape[1:]))
            return attend(query, key, value, visible)

        return call

    both({"window": 3, "causal": causal}, recorded)
    assert set(shapes) == {(4, seen, seen, 4, seen)}


def test_blocks_are_as_even_as_they_can_be_and_hold_a_quarter_of_the_logits_where_four_fit(monkeypatch):
    monkeypatch.setattr(masks, "SHORTEST_BLOCK", 2)
    segments = ops.ones((2, 15), dtype="int32")
    monkeypatch.setattr(masks, "BLOCK_BYTES", 4 * 2 * 3 * 15 * 4)
    assert visible_keys(3, segments, segments).block == 4
    assert visible_keys(6, segments, segments).block == 2
    assert visible_keys(12, segments, segments).block == 2  # the shortest
    assert visible_keys(3, segments[:1], segments[:1]).block == 8
    assert visible_keys(3, segments[:, :4], segments).shape == (2, 4, 15)  # they fit
