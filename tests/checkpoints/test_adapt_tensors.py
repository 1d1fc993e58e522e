"""Gemma 2's tensors as T5Gemma's, one by one; that the function is kept is tested on models."""

import dataclasses

import numpy as np
import pytest
from helpers.peers import tiny_gemma_stack
from helpers.tiny import NamedArrays

from keras_t5gemma.checkpoints.adapt import AdaptedTensors, adapted_config
from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config
from keras_t5gemma.checkpoints.load import check_source
from keras_t5gemma.checkpoints.sources import Source, gemma2_source
from keras_t5gemma.checkpoints.tensor_source import CheckpointError

# In a T5Gemma's cross-attention and in the Gemma 2 self-attention it may come from.
CROSS = {
    "cross_attn.q_proj": "self_attn.q_proj",
    "cross_attn.k_proj": "self_attn.k_proj",
    "cross_attn.v_proj": "self_attn.v_proj",
    "cross_attn.o_proj": "self_attn.o_proj",
    "pre_cross_attn_layernorm": "input_layernorm",
    "post_cross_attn_layernorm": "post_attention_layernorm",
}
SAME = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "pre_self_attn_layernorm": "input_layernorm",
    "post_self_attn_layernorm": "post_attention_layernorm",
    "pre_feedforward_layernorm": "pre_feedforward_layernorm",
    "post_feedforward_layernorm": "post_feedforward_layernorm",
}


def drawn(config, seed, dtype="float16"):
    """A Gemma 2's tensors, drawn; bfloat16's stand-in is float16."""
    generator = np.random.default_rng(seed)
    return NamedArrays(
        {tensor.gemma2: generator.standard_normal(tensor.stored_shape).astype(dtype) for tensor in config.tensors()}
    )


def source(seed=0, vocabulary_size=40, **changes):
    config = Gemma2Config(tiny_gemma_stack(**changes), vocabulary_size, 6.0)
    return Source(config, drawn(config, seed))


WIDER = {"hidden_dim": 48, "num_layers": 2, "num_query_heads": 6, "intermediate_dim": 20}


def cross_names(adapted):
    return [name for name in adapted.names() if "cross_attn" in name]


@pytest.mark.parametrize("wider", [{}, WIDER], ids=["balanced", "unbalanced"])
def test_adapted_tensors_are_exactly_those_of_the_t5gemma(wider):
    adapted = AdaptedTensors(source(1, **wider), source(2))
    assert check_source(adapted.config, adapted) == []
    for name in adapted.names():
        array = adapted.read(name)
        assert array.shape == adapted.shape(name)
        assert array.dtype == adapted.dtype(name) == "float16"


@pytest.mark.parametrize("wider", [{}, WIDER], ids=["balanced", "unbalanced"])
def test_each_stack_takes_its_own_gemma2_layer_by_layer(wider):
    sources = {"encoder": source(1, **wider), "decoder": source(2)}
    adapted = AdaptedTensors(**sources)
    for stack, taken in sources.items():
        pairs = {f"model.{stack}.embed_tokens.weight": "model.embed_tokens.weight"}
        pairs[f"model.{stack}.norm.weight"] = "model.norm.weight"
        for layer in range(taken.config.stack.num_layers):
            for mine, theirs in SAME.items():
                pairs[f"model.{stack}.layers.{layer}.{mine}.weight"] = f"model.layers.{layer}.{theirs}.weight"
        for mine, theirs in pairs.items():
            np.testing.assert_array_equal(adapted.read(mine), taken.tensors.read(theirs))


@pytest.mark.parametrize("cross_attention", ["auto", "self-attention"])
def test_balanced_cross_attention_is_the_decoders_self_attention_with_its_norms(cross_attention):
    decoder = source(2)
    adapted = AdaptedTensors(source(1), decoder, cross_attention=cross_attention)
    assert adapted.cross_attention == "self-attention"
    for layer in range(3):
        for mine, theirs in CROSS.items():
            expected = decoder.tensors.read(f"model.layers.{layer}.{theirs}.weight")
            np.testing.assert_array_equal(adapted.read(f"model.decoder.layers.{layer}.{mine}.weight"), expected)


def test_unbalanced_cross_attention_is_drawn():
    adapted = AdaptedTensors(source(1, **WIDER), source(2))
    assert adapted.cross_attention == "random"
    drawn = []
    for name in cross_names(adapted):
        array = adapted.read(name).astype("float64")
        if "layernorm" in name:
            assert not array.any()
        else:
            # initializer_range; the smallest kernel has 768 numbers.
            assert array.std() == pytest.approx(0.02, rel=0.15)
            drawn.append(array.ravel()[:100])
    assert abs(np.corrcoef(drawn)[~np.eye(len(drawn), dtype=bool)]).max() < 0.5  # no two alike


def test_random_cross_attention_can_be_asked_for_where_stacks_are_balanced():
    adapted = AdaptedTensors(source(1), source(2), cross_attention="random")
    assert not adapted.read("model.decoder.layers.0.pre_cross_attn_layernorm.weight").any()


def test_same_seed_draws_the_same_whatever_the_order():
    unbalanced = (source(1, **WIDER), source(2))
    one, again, other = (AdaptedTensors(*unbalanced, seed=seed) for seed in (3, 3, 4))
    kernels = [name for name in cross_names(one) if name.endswith("proj.weight")]
    first = {name: one.read(name) for name in kernels}
    for name in reversed(kernels):
        np.testing.assert_array_equal(again.read(name), first[name])
        assert (other.read(name) != first[name]).any()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "self-attention"),
        ({"dropout": 0.1}, "self-attention"),
        ({"num_layers": 2}, "random"),
        ({"sliding_window": 3}, "random"),
        ({"intermediate_dim": 20}, "random"),
    ],
)
def test_auto_means_self_attention_only_where_the_stacks_compute_alike(changes, expected):
    assert AdaptedTensors(source(1, **changes), source(2)).cross_attention == expected


def test_self_attention_for_stacks_of_one_width_and_other_depths_is_allowed():
    adapted = AdaptedTensors(source(1, num_layers=2), source(2), cross_attention="self-attention")
    assert check_source(adapted.config, adapted) == []


def test_self_attention_for_stacks_of_other_widths_is_refused():
    with pytest.raises(CheckpointError, match="encoder has 48, the decoder 32"):
        AdaptedTensors(source(1, **WIDER), source(2), cross_attention="self-attention")


def test_unknown_cross_attention_is_refused():
    with pytest.raises(ValueError, match=r"`cross_attention` must be one of .*Received: 'copy'"):
        AdaptedTensors(source(1), source(2), cross_attention="copy")


def test_different_vocabularies_are_refused():
    with pytest.raises(CheckpointError, match="vocabulary of 40, the decoder's one of 41"):
        AdaptedTensors(source(1), source(2, vocabulary_size=41))


def test_adapted_config_has_the_decoders_logits_and_the_encoders_attention():
    encoder, decoder = source(1, **WIDER).config, source(2).config
    config = adapted_config(dataclasses.replace(encoder, final_logit_soft_cap=9.0), decoder, "causal")
    assert (config.encoder, config.decoder) == (encoder.stack, decoder.stack)
    assert (config.vocabulary_size, config.final_logit_soft_cap) == (40, 6.0)
    assert (config.encoder_attention, config.tie_embeddings) == ("causal", True)
    adapted = AdaptedTensors(source(1), source(2), encoder_attention="causal")
    assert adapted.config.encoder_attention == "causal"


def test_adapted_tensor_says_where_it_comes_from(gemma2_folder, keras_gemma):
    gemma2 = gemma2_source(gemma2_folder)
    adapted = AdaptedTensors(gemma2_source(keras_gemma), gemma2)
    where = adapted.where("model.encoder.layers.0.mlp.up_proj.weight")
    assert where == "keras-hub's GemmaBackbone (decoder_block_0/ffw_gating_2/kernel)"
    where = adapted.where("model.decoder.layers.0.cross_attn.q_proj.weight")
    assert where == gemma2.tensors.where("model.layers.0.self_attn.q_proj.weight")
