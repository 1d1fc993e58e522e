"""The model's tensors in the layout of CTranslate2.

CTranslate2 describes a model by a tree of specs, one per layer, whose attributes are arrays. `CTranslate2` 4.8's own
converter of T5Gemma, which reads `transformers`' models, determines which attributes there are. It leaves out the final
soft cap and the layers without a window; this module sets them.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.exports.model_parts import Weights

# Our layer -> the attribute of CTranslate2's layer.
_NORMS = {
    "pre_self_attention_norm": "input_layer_norm",
    "post_self_attention_norm": "post_attention_layer_norm",
    "pre_cross_attention_norm": "external_pre_encoder_attention_layer_norm",
    "post_cross_attention_norm": "external_post_encoder_attention_layer_norm",
    "pre_feed_forward_norm": "pre_feedforward_layer_norm",
    "post_feed_forward_norm": "post_feedforward_layer_norm",
}
_FEED_FORWARD = {"gate": "linear_0", "up": "linear_0_noact", "down": "linear_1"}


def transformer_spec(config: T5GemmaConfig, weights: Weights, norm_dtype: str = "float32"):
    """A whole model as a `ctranslate2.specs.TransformerSpec`.

    Args:
        config: the model's config.
        weights: its tensors.
        norm_dtype: the dtype of the weights of norms.

    Returns:
        The spec, filled with arrays; only vocabularies and the model's config are missing.
    """
    from ctranslate2 import specs
    from ctranslate2.specs import transformer_spec as library

    encoder = library.TransformerEncoderSpec(**_options(config.encoder, specs))
    decoder = library.TransformerDecoderSpec(
        **_options(config.decoder, specs), with_encoder_attention=True, external_pre_post_encoder_layers=True
    )
    _fill_stack(encoder, encoder.embeddings[0], config.encoder, weights, "encoder", norm_dtype)
    _fill_stack(decoder, decoder.embeddings, config.decoder, weights, "decoder", norm_dtype)
    # Of the whole stack: more than its window at once. Zero, because each layer has a window of its own.
    encoder.sliding_window = decoder.sliding_window = np.int32(0)
    if config.final_logit_soft_cap is not None:
        decoder.final_logit_softcapping = np.float32(config.final_logit_soft_cap)
    untied = "decoder/token_embedding/reverse_embeddings"
    decoder.projection.weight = weights.stored(untied) if untied in weights else decoder.embeddings.weight
    return library.TransformerSpec(encoder, decoder)


def _options(stack: StackConfig, specs) -> dict:
    """The arguments of both stacks' specs."""
    return {
        "num_layers": stack.num_layers,
        "num_heads": stack.num_query_heads,
        "num_heads_kv": None
        if _repeats(stack) * stack.num_key_value_heads == stack.num_query_heads
        else (stack.num_key_value_heads),
        "head_dim": stack.head_dim,
        "pre_norm": True,
        "pre_post_layer_norm": True,
        "rms_norm": True,
        "activation": specs.Activation.GELUTanh,
        "ffn_glu": True,
        "rotary_dim": stack.head_dim,
        "rotary_interleave": False,
        "rotary_base": stack.rope_wavelength,
        "sliding_window": 0,
    }


def _repeats(stack: StackConfig) -> int:
    """How often each key and value head is written.

    CTranslate2 stores a single head without an axis of heads, where its windows cut the wrong axis. So a single head is
    written once per query head.
    """
    return stack.num_query_heads if stack.num_key_value_heads == 1 else 1


def _fill_stack(spec, embedding, stack: StackConfig, weights: Weights, name: str, norm_dtype: str) -> None:
    """Fills the spec of one stack."""
    spec.scale_embeddings = True
    embedding.weight = weights.stored(f"{name}/token_embedding/embeddings")
    embedding.multiply_by_sqrt_depth = float(stack.hidden_dim**0.5)
    spec.layer_norm.gamma = _gamma(weights, f"{name}/final_norm", norm_dtype)
    for i, (layer, kind) in enumerate(zip(spec.layer, stack.layer_kinds, strict=True)):
        path = f"{name}/layer_{i}"
        for ours, theirs in _NORMS.items():
            if f"{path}/{ours}/scale" in weights:
                getattr(layer, theirs).gamma = _gamma(weights, f"{path}/{ours}", norm_dtype)
        attention = layer.self_attention
        query, key, value, output = _attention(weights, f"{path}/self_attention", stack)
        attention.linear[0].weight = np.concatenate([query, key, value])
        attention.linear[1].weight = output
        attention.queries_scale = np.float32(stack.query_scale)
        attention.sliding_window = np.int32(stack.sliding_window if kind == "sliding" else 0)
        if name == "decoder":
            query, key, value, output = _attention(weights, f"{path}/cross_attention", stack)
            layer.attention.linear[0].weight = query
            layer.attention.linear[1].weight = np.concatenate([key, value])
            layer.attention.linear[2].weight = output
            layer.attention.queries_scale = np.float32(stack.query_scale)
        for ours, theirs in _FEED_FORWARD.items():
            getattr(layer.ffn, theirs).weight = weights.stored(f"{path}/feed_forward/{ours}/kernel")


def _attention(weights: Weights, path: str, stack: StackConfig) -> list[np.ndarray]:
    """Kernels of query, key, value and output, each [out, in]."""
    query, key, value, output = (
        weights.stored(f"{path}/{name}/kernel") for name in ("query", "key", "value", "output")
    )
    repeats = (_repeats(stack), 1)
    return [query, np.tile(key, repeats), np.tile(value, repeats), output]


def _gamma(weights: Weights, path: str, dtype: str) -> np.ndarray:
    """The weight of a norm: one plus our scale."""
    gamma = 1 + weights.stored(f"{path}/scale").astype("float32")
    return gamma.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
