"""Long inputs: a model whose attention goes by blocks is the model whose attention does not."""

import numpy as np
import pytest
from keras import ops
from one_step import assert_same_step, batch, language_model, take_steps
from peers import loud_inputs, tiny_config
from tiny import loud_backbone

from keras_t5gemma.layers import attention, masks


@pytest.fixture
def blocks(monkeypatch):
    """Turns blocks of three or so on, and counts how often attention goes by them."""
    calls, in_blocks = [], attention.in_blocks

    def counted(*args):
        calls.append(args[-1].block)
        return in_blocks(*args)

    def turn_on():
        monkeypatch.setattr(masks, "BLOCK_BYTES", 1)
        monkeypatch.setattr(masks, "SHORTEST_BLOCK", 3)
        monkeypatch.setattr(attention, "in_blocks", counted)
        return calls

    return turn_on


def test_rematerialized_training_step_in_blocks_is_the_plain_one(blocks):
    """Computed again within what is computed again; `test_attention_blocks` has the gradients of attention alone."""
    lm = language_model()
    plain = take_steps(lm, batch(lm))
    calls = blocks()
    lm = language_model(rematerialize=True)
    assert_same_step(take_steps(lm, batch(lm)), plain)
    assert len(calls) >= 3  # the encoder's, the decoder's, and cross-attention


def test_tokens_read_in_blocks_after_those_in_a_cache_are_as_in_the_plain_pass(blocks):
    backbone = loud_backbone(tiny_config(num_layers=2))
    x = {name: ops.convert_to_tensor(value) for name, value in loud_inputs(backbone.config).items()}
    ids, mask = x["decoder_token_ids"], x["decoder_padding_mask"]
    encoded = backbone.encoder(x["encoder_token_ids"], x["encoder_padding_mask"]), x["encoder_padding_mask"]
    plain = backbone.decoder(ids, mask, *encoded)
    cache = backbone.decoder.start_cache(*encoded, 20)
    _, cache = backbone.decoder.step(ids[:, :5], mask[:, :5], cache, 0)
    calls = blocks()
    found, _ = backbone.decoder.step(ids[:, 5:], mask[:, 5:], cache, ops.convert_to_tensor(5))
    assert len(calls) == 4  # two layers, self- and cross-attention in each
    seen = ops.convert_to_numpy(mask)[:, 5:] > 0
    found, plain = (ops.convert_to_numpy(array)[seen] for array in (found, plain[:, 5:]))
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)
