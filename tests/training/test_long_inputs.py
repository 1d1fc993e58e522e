"""Long inputs: a model whose attention goes by blocks is the model whose attention does not."""

from one_step import assert_same_step, batch, language_model, take_steps

from keras_t5gemma.layers import attention, masks


def test_rematerialized_training_step_in_blocks_is_the_plain_one(monkeypatch):
    """Computed again within what is computed again; `test_attention_blocks` has the gradients of attention alone."""
    calls, in_blocks = [], attention.in_blocks

    def counted(*args, **options):
        calls.append(args)
        return in_blocks(*args, **options)

    lm = language_model()
    plain = take_steps(lm, batch(lm))
    monkeypatch.setattr(masks, "BLOCK_BYTES_ON_CPU", 1)
    monkeypatch.setattr(masks, "SHORTEST_BLOCK", 3)
    monkeypatch.setattr(attention, "in_blocks", counted)
    lm = language_model(rematerialize=True)
    assert_same_step(take_steps(lm, batch(lm)), plain)
    assert len(calls) >= 3  # the encoder's, the decoder's, and cross-attention
