"""Tiny Gemma 2 and what is read from checkpoint folders, compared."""

import ml_dtypes
import numpy as np
import torch
import transformers

from helpers.peers import (
    hf_logits,
    loud_inputs,
    tiny_gemma_stack,
)
from keras_t5gemma.checkpoints.hugging_face.export import ModelTensors
from keras_t5gemma.checkpoints.sources import t5gemma_source
from keras_t5gemma.models.adapted import adapt_gemma2
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

BF16 = np.dtype(ml_dtypes.bfloat16)
# keras-hub's Gemma can express both.
STACKS = {
    "small": tiny_gemma_stack(),
    "large": tiny_gemma_stack(hidden_dim=48, num_layers=4, num_query_heads=6, num_key_value_heads=3),
}
GEMMA2 = [f"{form}_{size}" for form in ("hf", "hf_sharded", "keras", "keras_sharded") for size in STACKS]


def arrays_of(checkpoint):
    source = t5gemma_source(checkpoint).tensors
    return {name: source.read(name) for name in source.names()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def in_memory(encoder, decoder=None, **options):
    """What `adapt_gemma2` makes, under Hugging Face's names."""
    source = ModelTensors(adapt_gemma2(encoder, decoder, **options))
    return {name: np.ascontiguousarray(source.read(name)) for name in source.names()}


def assert_transformers_agrees(folder, backbone):
    """Within the window: beyond it, `transformers`' encoder sees one key too many."""
    inputs = loud_inputs(backbone.config, encoder_length=4)
    inputs["encoder_padding_mask"][:, 1:] = 1
    peer, info = transformers.T5GemmaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = hf_logits(peer.eval(), inputs)
    found = T5GemmaSeq2SeqLM(backbone).predict(inputs, verbose=0)
    keep = inputs["decoder_padding_mask"].astype(bool)
    assert np.abs(found - expected)[keep].max() < 1e-4 * np.abs(expected[keep]).max()
