"""Attention in blocks of queries: the numbers of the plain one, without its memory."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from attention_cases import CASES, OTHERS, SEGMENTS, both, inputs
from keras import ops

from keras_t5gemma.layers import masks
from keras_t5gemma.layers.attention import attend
from keras_t5gemma.layers.attention_blocks import in_blocks
from keras_t5gemma.layers.masks import BlockMask, attention_mask, visible_keys


def blocks_of(attend, query, key, value, mask, _cap):
    return in_blocks(attend, query, key, value, mask)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_are_those_of_the_plain_one(case):
    found, expected = both(case, blocks_of)
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
    (output, query_gradient, *_), _ = both({"keys": OTHERS}, blocks_of)
    for row, query in ((0, 0), (0, 8), (1, 0), (1, 12)):
        assert (output[row, query] == 0).all()
        assert (query_gradient[row, query] == 0).all()


@pytest.mark.parametrize(("causal", "seen"), [(False, 4 + 2 * 2), (True, 4 + 2)])
def test_block_of_a_window_takes_only_the_keys_within_it(causal, seen):
    shapes = []

    def recorded(attend):
        def call(query, key, value, visible):
            shapes.append((query.shape[1], key.shape[2], value.shape[2], *visible.shape[1:]))
            return attend(query, key, value, visible)

        return call

    both({"window": 3, "causal": causal}, lambda attend, *rest: blocks_of(recorded(attend), *rest))
    assert set(shapes) == {(4, seen, seen, 4, seen)}


def test_blocks_are_as_even_as_they_can_be_and_hold_a_quarter_of_the_logits_where_four_fit(monkeypatch):
    monkeypatch.setattr(masks, "SHORTEST_BLOCK", 2)
    segments = ops.ones((2, 15), dtype="int32")
    monkeypatch.setattr(masks, "BLOCK_BYTES_ON_CPU", 4 * 2 * 3 * 15 * 4)
    assert visible_keys(3, segments, segments).block == 4
    assert visible_keys(6, segments, segments).block == 2
    assert visible_keys(12, segments, segments).block == 2  # the shortest
    assert visible_keys(3, segments[:1], segments[:1]).block == 8
    assert visible_keys(3, segments[:, :4], segments).shape == (2, 4, 15)  # they fit
