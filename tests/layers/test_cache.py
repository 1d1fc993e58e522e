"""Places of a cache: which position each holds, and what writing leaves alone."""

import numpy as np
import pytest
from keras import ops

from keras_t5gemma.layers import cache


def test_positions_of_a_ring_are_those_of_the_picture():
    assert ops.convert_to_numpy(cache.positions(6, 7)).tolist() == [6, 7, 2, 3, 4, 5]


def test_positions_before_the_ring_is_full_are_below_zero_where_nothing_was_written():
    assert (ops.convert_to_numpy(cache.positions(6, 2)) == [0, 1, 2, -3, -2, -1]).all()


def test_places_are_no_more_than_the_window_and_what_is_written_ahead():
    assert cache.cache_slots(100, 8, 4) == 12
    assert cache.cache_slots(10, 8, 4) == 10
    assert cache.cache_slots(100, None, 4) == 100


@pytest.mark.parametrize("traced", [False, True], ids=["known", "tensor"])
@pytest.mark.parametrize("sizes", [[1] * 11, [4, 3, 1, 2, 1], [6, 5]])
def test_each_place_holds_the_newest_of_its_positions(sizes, traced):
    size, buffer, index = 6, ops.zeros((1, 1, 6, 1)), 0
    for count in sizes:
        update = np.arange(index, index + count, dtype="float32").reshape(1, 1, count, 1) + 100
        where = ops.convert_to_tensor(index, dtype="int32") if traced else index
        where = cache.slot_of(where, size) if count == 1 else where
        buffer = cache.write(buffer, ops.convert_to_tensor(update), where)
        index += count
        held = ops.convert_to_numpy(cache.positions(size, index - 1))
        found = ops.convert_to_numpy(buffer).ravel()
        np.testing.assert_array_equal(found, np.where(held >= 0, held + 100, 0))
