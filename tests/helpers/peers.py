"""Tiny random models of other libraries, as oracles: "loud" ones, in which every mechanism changes the output.

Loud means: windows shorter than the test sequences, weights so large that both soft caps bite, norms whose scale is not
zero, more query heads than key/value heads, heads whose sizes do not add up to the width, and, unbalanced, stacks that
differ in every number.
"""

import dataclasses

import numpy as np

from keras_t5gemma.config import StackConfig, T5GemmaConfig

VOCABULARY_SIZE = 128
_BALANCED = StackConfig(
    num_layers=3,
    hidden_dim=32,
    intermediate_dim=48,
    num_query_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    sliding_window=5,
    query_scalar=20,
    attention_soft_cap=5.0,
)
_WIDER_ENCODER = StackConfig(
    num_layers=4,
    hidden_dim=40,
    intermediate_dim=56,
    num_query_heads=8,
    num_key_value_heads=4,
    head_dim=6,
    sliding_window=4,
    query_scalar=9,
    attention_soft_cap=4.0,
)


def tiny_config(balanced=True, **changes):
    """A loud `T5GemmaConfig`, balanced (both stacks alike) or with an encoder that differs in every number.

    Args:
        balanced: whether the stacks are alike.
        **changes: fields of `T5GemmaConfig`; `encoder` and `decoder` may be mappings of the fields to change there.
            Any other name is a field of `StackConfig` and changes both stacks.
    """
    model_fields = {field.name for field in dataclasses.fields(T5GemmaConfig)} - {"encoder", "decoder"}
    both = {name: changes.pop(name) for name in list(changes) if name not in model_fields | {"encoder", "decoder"}}
    stacks = {}
    for name, start in (("encoder", _BALANCED if balanced else _WIDER_ENCODER), ("decoder", _BALANCED)):
        change = changes.pop(name, {})
        stacks[name] = change if isinstance(change, StackConfig) else dataclasses.replace(start, **{**both, **change})
    return T5GemmaConfig(**{"vocabulary_size": VOCABULARY_SIZE, "final_logit_soft_cap": 6.0, **stacks, **changes})


def tiny_gemma_stack(**changes):
    """A loud `StackConfig` that keras-hub's `GemmaBackbone` can express too (it scales queries by the head size)."""
    return dataclasses.replace(_BALANCED, **{"query_scalar": None, **changes})


def hf_t5gemma(config, seed=0, published_window=False):
    """`transformers`' T5Gemma with loud random weights, in float32, eager attention, evaluation mode.

    Args:
        config: our `T5GemmaConfig`, with a bidirectional encoder.
        seed: of the weights.
        published_window: whether the encoder's config keeps `sliding_window` as a checkpoint has it. `transformers`
            5.23 lets an encoder query see `|q - k| <= sliding_window`, one key more on each side than the JAX reference
            and `transformers` 4.53 to 4.57 (`|q - k| < sliding_window`); to compute the same function, the oracle's
            encoder is built with a window one smaller unless this is True.
    """
    import transformers

    assert config.encoder_attention == "bidirectional", "transformers has no causal encoder"
    encoder = _hf_stack(config.encoder) | {"vocab_size": config.vocabulary_size}
    if not published_window:
        encoder["sliding_window"] -= 1
    decoder = _hf_stack(config.decoder) | {"vocab_size": config.vocabulary_size}
    decoder["final_logit_softcapping"] = config.final_logit_soft_cap
    model = transformers.T5GemmaForConditionalGeneration(
        transformers.T5GemmaConfig(
            encoder=transformers.T5GemmaModuleConfig(**encoder),
            decoder=transformers.T5GemmaModuleConfig(**decoder),
            vocab_size=config.vocabulary_size,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )
    return _loud_torch(model, seed)


def hf_gemma2(stack, vocabulary_size=VOCABULARY_SIZE, seed=0, final_logit_soft_cap=6.0):
    """`transformers`' Gemma 2 with loud random weights, in float32, eager attention, evaluation mode."""
    import transformers

    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **_hf_stack(stack),
            vocab_size=vocabulary_size,
            final_logit_softcapping=final_logit_soft_cap,
            attn_implementation="eager",
        )
    )
    return _loud_torch(model, seed)


def tiny_keras_gemma(stack, vocabulary_size=VOCABULARY_SIZE, seed=0, final_logit_soft_cap=6.0):
    """keras-hub's `GemmaBackbone`, set up as Gemma 2, with loud random weights."""
    import keras_hub

    # What keras-hub's Gemma fixes: queries scaled by the head size, RoPE at 10,000, 1e-6 in the blocks' norms.
    assert stack.query_scalar in (None, stack.head_dim)
    assert (stack.rope_wavelength, stack.norm_epsilon) == (10_000, 1e-6)
    assert stack.layer_pattern == ("sliding", "global")
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=vocabulary_size,
        num_layers=stack.num_layers,
        num_query_heads=stack.num_query_heads,
        num_key_value_heads=stack.num_key_value_heads,
        hidden_dim=stack.hidden_dim,
        # keras-hub counts both halves of the gated feed-forward.
        intermediate_dim=2 * stack.intermediate_dim,
        head_dim=stack.head_dim,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=stack.attention_soft_cap,
        final_logit_soft_cap=final_logit_soft_cap,
        use_sliding_window_attention=True,
        sliding_window_size=stack.sliding_window,
    )
    generator = np.random.default_rng(seed)
    for variable in backbone.variables:
        fan_in = (
            stack.num_query_heads * stack.head_dim if "attention_output" in variable.path else variable.shape[-2:][0]
        )
        variable.assign(_loud(generator, tuple(variable.shape), "embed" in variable.path, fan_in))
    return backbone


def loud_inputs(config, batch=3, encoder_length=17, decoder_length=13, seed=0):
    """Token ids several windows long, with right padding, left padding and none, as a dict of int32 arrays.

    Returns:
        `encoder_token_ids` and `encoder_padding_mask` [B, S], `decoder_token_ids` and `decoder_padding_mask` [B, T].
    """
    generator = np.random.default_rng(seed)
    inputs = {}
    for name, length in (("encoder", encoder_length), ("decoder", decoder_length)):
        mask = np.ones((batch, length), "int32")
        for row in range(1, batch):
            padding = 1 + int(generator.integers(length // 2))
            mask[row, -padding if row % 2 else 0 : None if row % 2 else padding] = 0
        tokens = generator.integers(3, config.vocabulary_size, size=(batch, length), dtype="int32")
        inputs[f"{name}_token_ids"] = tokens * mask
        inputs[f"{name}_padding_mask"] = mask
    return inputs


def hf_logits(model, inputs):
    """Logits [B, T, V] of `transformers`' T5Gemma on `loud_inputs`, as numpy, counting positions from 0 as we do.

    At padded queries `transformers` averages over all keys where we give zero: compare where the mask is 1.
    """
    import torch

    tensors = {name: torch.from_numpy(np.asarray(value)).long() for name, value in inputs.items()}
    with torch.no_grad():
        return model(
            input_ids=tensors["encoder_token_ids"],
            attention_mask=tensors["encoder_padding_mask"],
            decoder_input_ids=tensors["decoder_token_ids"],
            decoder_attention_mask=tensors["decoder_padding_mask"],
        ).logits.numpy()


def _hf_stack(stack):
    """The fields of `T5GemmaModuleConfig` and `Gemma2Config` for one stack."""
    kinds = {"sliding": "sliding_attention", "global": "full_attention"}
    return {
        "hidden_size": stack.hidden_dim,
        "intermediate_size": stack.intermediate_dim,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_query_heads,
        "num_key_value_heads": stack.num_key_value_heads,
        "head_dim": stack.head_dim,
        "query_pre_attn_scalar": stack.head_dim if stack.query_scalar is None else stack.query_scalar,
        "sliding_window": stack.sliding_window,
        "layer_types": [kinds[kind] for kind in stack.layer_kinds],
        "attn_logit_softcapping": stack.attention_soft_cap,
        "rope_parameters": {"rope_type": "default", "rope_theta": stack.rope_wavelength},
        "rms_norm_eps": stack.norm_epsilon,
        "attention_dropout": 0.0,
    }


def _loud_torch(model, seed):
    import torch

    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            values = _loud(generator, shape, "embed" in name or "lm_head" in name, shape[-1])
            parameter.copy_(torch.from_numpy(values))
    return model.eval()


def _loud(generator, shape, embedding, fan_in):
    if len(shape) == 1:
        return generator.uniform(-0.5, 1.0, shape).astype("float32")
    scale = 0.35 if embedding else 1.7 * fan_in**-0.5
    return (scale * generator.standard_normal(shape)).astype("float32")


KINDS = {"sliding": "sliding_attention", "global": "full_attention"}


def keras_t5gemma(config, **changes):
    """keras-hub's own T5Gemma."""
    sizes = {
        f"{name}_{theirs}": getattr(stack, ours)
        for name, stack in (("encoder", config.encoder), ("decoder", config.decoder))
        for ours, theirs in (
            ("hidden_dim", "hidden_dim"),
            ("intermediate_dim", "intermediate_dim"),
            ("num_layers", "num_layers"),
            ("num_query_heads", "num_attention_heads"),
            ("num_key_value_heads", "num_key_value_heads"),
            ("head_dim", "head_dim"),
        )
    }
    import keras_hub

    shared = config.decoder
    backbone = keras_hub.models.T5GemmaBackbone(
        **{
            "vocabulary_size": config.vocabulary_size,
            **sizes,
            "encoder_layer_types": [KINDS[kind] for kind in config.encoder.layer_kinds],
            "decoder_layer_types": [KINDS[kind] for kind in config.decoder.layer_kinds],
            "query_pre_attn_scalar": shared.head_dim if shared.query_scalar is None else shared.query_scalar,
            "sliding_window": shared.sliding_window,
            "attn_logit_softcapping": shared.attention_soft_cap,
            "final_logit_softcapping": config.final_logit_soft_cap,
            "tie_word_embeddings": config.tie_embeddings,
            "rope_max_wavelength": shared.rope_wavelength,
            "rms_norm_eps": shared.norm_epsilon,
            **changes,
        }
    )
    generator = np.random.default_rng(0)
    for variable in backbone.weights:
        variable.assign(generator.uniform(-0.5, 0.5, tuple(variable.shape)))
    return backbone
