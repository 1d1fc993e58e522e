"""`adapt_gemma2`: a T5Gemma from one Gemma 2 or from two."""

from pathlib import Path

import keras_hub

from keras_t5gemma.checkpoints.adapt import AdaptedTensors
from keras_t5gemma.checkpoints.load import load
from keras_t5gemma.checkpoints.sources import gemma2_source
from keras_t5gemma.models.backbone import T5GemmaBackbone


def adapt_gemma2(
    encoder: str | Path | keras_hub.models.GemmaBackbone | keras_hub.models.GemmaCausalLM,
    decoder: str | Path | keras_hub.models.GemmaBackbone | keras_hub.models.GemmaCausalLM | None = None,
    *,
    cross_attention: str = "auto",
    encoder_attention: str = "bidirectional",
    encoder_heads: str = "grouped",
    seed: int = 0,
    **kwargs,
) -> T5GemmaBackbone:
    """Turns Gemma 2 into an encoder-decoder (arXiv 2504.06225).

    The encoder takes every weight of its Gemma 2. Only its attention changes: it becomes bidirectional. Each decoder
    block takes self-attention, feed-forward and their norms from the same layer of its Gemma 2. With a causal mask, the
    adapted encoder gives exactly its Gemma 2's hidden states. Without the contribution of cross-attention, the adapted
    decoder gives exactly its Gemma 2's logits.

    Args:
        encoder: a Gemma 2: a folder in Hugging Face's or Keras's format, "hf://google/gemma-2-2b", a keras-hub preset
            such as "gemma2_9b_en", or a `keras_hub.models.GemmaBackbone` or `GemmaCausalLM`.
        decoder: the Gemma 2 of the decoder; the encoder's if left out.
        cross_attention: initial weights of cross-attention. "self-attention": those of the decoder's self-attention,
            layer by layer. "random": random weights, to be trained alone for the first 1,000 steps
            (`CrossAttentionWarmup`). "auto", the paper's rule: "self-attention" if both Gemma 2 have the same
            configuration, otherwise "random".
        encoder_attention: "bidirectional"; or "causal", an ablation in the paper.
        encoder_heads: "grouped", as in Gemma 2; or "multi", another ablation, which copies key and value heads so that
            each query head has its own.
        seed: seed of the random weights.
        **kwargs: `dtype`, `name`.

    Returns:
        A `T5GemmaBackbone`.

    Raises:
        ValueError: if an argument is invalid, a checkpoint is not a Gemma 2, or the two do not fit.
        ConnectionError: if a download failed.

    Example:
        >>> backbone = kt.adapt_gemma2("gemma2_9b_en", "gemma2_2b_en", dtype="bfloat16")
        >>> lm = kt.T5GemmaSeq2SeqLM(backbone, preprocessor)
    """
    encoder_source = gemma2_source(encoder)
    decoder_source = encoder_source if decoder is None else gemma2_source(decoder)
    adapted = AdaptedTensors(
        encoder_source,
        decoder_source,
        encoder_attention=encoder_attention,
        encoder_heads=encoder_heads,
        cross_attention=cross_attention,
        seed=seed,
    )
    return load(lambda: T5GemmaBackbone(**adapted.config.to_dict(), **kwargs), adapted.config, adapted)
