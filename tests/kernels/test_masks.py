import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_t5gemma.kernels.attention.masks import attention_mask


def draw(mask):
    return ["".join("x" if seen else "." for seen in row) for row in ops.convert_to_numpy(mask)[0]]


SEGMENTS = np.array([[1, 1, 1, 1, 1, 0]])
# The pictures of `attention_mask`'s docstring.
PICTURES = {
    "global": ((), "xxxxx. xxxxx. xxxxx. xxxxx. xxxxx. ......"),
    "causal": ({"causal": True}, "x..... xx.... xxx... xxxx.. xxxxx. ......"),
    "causal_window": ({"causal": True, "window": 3}, "x..... xx.... xxx... .xxx.. ..xxx. ......"),
    "window": ({"window": 3}, "xxx... xxxx.. xxxxx. .xxxx. ..xxx. ......"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_mask_of_one_segment_looks_as_in_the_docstring(kind):
    options, picture = PICTURES[kind]
    assert draw(attention_mask(SEGMENTS, SEGMENTS, **dict(options))) == picture.split()


def test_mask_of_packed_examples_keeps_segments_apart():
    segments = np.array([[1, 1, 2, 2, 2, 0]])
    assert draw(attention_mask(segments, segments, causal=True)) == "x..... xx.... ..x... ..xx.. ..xxx. ......".split()


def test_mask_of_packed_pairs_joins_segments_across_sequences():
    queries, keys = np.array([[1, 2, 2, 0]]), np.array([[1, 1, 1, 2, 0]])
    assert draw(attention_mask(queries, keys)) == "xxx.. ...x. ...x. .....".split()


def test_mask_of_a_cached_step_is_that_row_of_the_whole_mask():
    whole = ops.convert_to_numpy(attention_mask(SEGMENTS, SEGMENTS, causal=True, window=3))
    for position in range(6):
        row = attention_mask(
            SEGMENTS[:, position : position + 1], SEGMENTS, query_start=position, causal=True, window=3
        )
        np.testing.assert_array_equal(ops.convert_to_numpy(row)[0, 0], whole[0, position])


@settings(max_examples=60, deadline=None)
@given(
    queries=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    keys=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 10)),
    start=st.integers(0, 5),
)
def test_mask_equals_its_definition_pair_by_pair(queries, keys, causal, window, start):
    got = attention_mask(np.array([queries]), np.array([keys]), query_start=start, causal=causal, window=window)
    for i, query in enumerate(queries):
        for k, key in enumerate(keys):
            distance = start + i - k
            expected = query == key != 0
            expected &= not causal or distance >= 0
            expected &= window is None or abs(distance) < window
            assert bool(ops.convert_to_numpy(got)[0, i, k]) == expected
