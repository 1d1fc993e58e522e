"""What must hold of a T5Gemma adapted from Gemma 2 (arXiv 2504.06225)."""

import numpy as np
import pytest
from helpers.peers import VOCABULARY_SIZE, hf_gemma2, tiny_gemma_stack
from keras import ops

from keras_t5gemma.models.adapted import adapt_gemma2
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

STACKS = {"small": tiny_gemma_stack(), "large": tiny_gemma_stack(hidden_dim=40, num_layers=4, num_query_heads=8)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Gemma 2 a size, saved by `transformers`, and the models themselves."""
    saved = {}
    for seed, (name, stack) in enumerate(STACKS.items()):
        model = hf_gemma2(stack, seed=seed)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        saved[name] = (folder, model)
    return saved


def gemma2_logits_and_states(model, ids):
    import torch

    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(ids).long(), output_hidden_states=True)
    return output.logits.numpy(), output.hidden_states[-1].numpy()


@pytest.mark.parametrize(("encoder", "decoder"), [("small", "small"), ("large", "small")])
def test_adapted_stacks_still_compute_their_gemma2(folders, encoder, decoder):
    ids = np.random.default_rng(0).integers(3, VOCABULARY_SIZE, (2, 13))
    backbone = adapt_gemma2(folders[encoder][0], folders[decoder][0], encoder_attention="causal")
    for block in backbone.decoder.blocks:  # without its output, cross-attention contributes nothing
        kernel = block.cross_attention.output_dense.kernel
        kernel.assign(np.zeros(tuple(kernel.shape), "float32"))
    inputs = {f"{side}_token_ids": ids for side in ("encoder", "decoder")}
    inputs |= {f"{side}_padding_mask": np.ones_like(ids) for side in ("encoder", "decoder")}
    states = ops.convert_to_numpy(backbone(inputs)["encoder_sequence_output"])
    _, expected = gemma2_logits_and_states(folders[encoder][1], ids)
    np.testing.assert_allclose(states, expected, atol=1e-4)
    logits = ops.convert_to_numpy(T5GemmaSeq2SeqLM(backbone)(inputs))
    expected, _ = gemma2_logits_and_states(folders[decoder][1], ids)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_adapted_cross_attention_starts_from_self_attention_only_where_balanced(folders):
    balanced = adapt_gemma2(folders["small"][0])
    unbalanced = adapt_gemma2(folders["large"][0], folders["small"][0])
    for backbone, copied in ((balanced, True), (unbalanced, False)):
        block = backbone.decoder.blocks[1]
        own, cross = (
            ops.convert_to_numpy(attention.query_dense.kernel.value)
            for attention in (block.self_attention, block.cross_attention)
        )
        assert (own == cross).all() == copied
