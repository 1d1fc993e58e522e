"""A decoding step of rows that are each at a position of their own: the numbers of the whole forward pass."""

import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras import ops

from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.kernels.cache_update import write_at

CONFIG = tiny_config(balanced=False, num_layers=2)  # the decoder's window is 5, the sequence 13
LENGTH = 13


@pytest.fixture(scope="module")
def backbone():
    return loud_backbone(CONFIG)


@pytest.mark.parametrize("ring", [False, True], ids=["whole", "ring"])
def test_step_with_a_position_per_row_equals_the_whole_forward_pass(backbone, ring):
    inputs = loud_inputs(CONFIG, batch=3)
    outputs = backbone(inputs)
    expected = ops.convert_to_numpy(outputs["decoder_sequence_output"])
    ids, mask = (inputs[f"decoder_{name}"] for name in ("token_ids", "padding_mask"))
    decoder = backbone.decoder
    cache = decoder.start_cache(
        outputs["encoder_sequence_output"], inputs["encoder_padding_mask"], LENGTH, 1 if ring else None
    )
    step = Program(decoder.step, backbone)
    got, index, rows = np.zeros_like(expected), np.zeros(3, "int32"), np.arange(3)
    turn = 0
    while (index < LENGTH).any():
        # Row r moves in r + 1 of three turns; a row that does not move repeats its step, as at its end.
        here = np.minimum(index, LENGTH - 1)
        hidden, cache = step(ids[rows, here][:, None], mask[rows, here][:, None], cache, here)
        got[rows, here] = ops.convert_to_numpy(hidden)[:, 0]
        index = np.where((turn % 3 <= rows) & (index < LENGTH), index + 1, index).astype("int32")
        turn += 1
    assert turn > 2 * LENGTH
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_several_tokens_with_a_position_per_row_are_an_error(backbone):
    inputs = loud_inputs(CONFIG, batch=2)
    output = backbone.encoder(inputs["encoder_token_ids"], inputs["encoder_padding_mask"])
    cache = backbone.decoder.start_cache(output, inputs["encoder_padding_mask"], LENGTH)
    ids = ops.convert_to_tensor(inputs["decoder_token_ids"][:, :2])
    with pytest.raises(ValueError, match="one token per row"):
        backbone.decoder.step(ids, ops.ones_like(ids), cache, ops.convert_to_tensor([0, 1], "int32"))


@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 6, 4)])
def test_write_with_a_position_per_row_writes_one_position_of_each(shape):
    axis = len(shape) // 2
    generator = np.random.default_rng(0)
    buffer, update = (generator.normal(size=size).astype("float32") for size in (shape, shape))
    update = update.take([0], axis)
    expected, index = buffer.copy(), np.array([5, 0, 3], "int32")
    for row, at in enumerate(index):
        if axis == 1:
            expected[row, at] = update[row, 0]
        else:
            expected[row, :, at] = update[row, :, 0]
    written = write_at(ops.convert_to_tensor(buffer), ops.convert_to_tensor(update), ops.convert_to_tensor(index), axis)
    np.testing.assert_array_equal(ops.convert_to_numpy(written), expected)
