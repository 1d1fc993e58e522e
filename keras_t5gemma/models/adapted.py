"""`adapt_gemma2`: a T5Gemma made of one Gemma 2 or of two."""

from keras_t5gemma.checkpoints.adapt import AdaptedTensors
from keras_t5gemma.checkpoints.load import load
from keras_t5gemma.checkpoints.sources import gemma2_source
from keras_t5gemma.models.backbone import T5GemmaBackbone


def adapt_gemma2(
    encoder,
    decoder=None,
    *,
    cross_attention="auto",
    encoder_attention="bidirectional",
    encoder_heads="grouped",
    seed=0,
    **kwargs,
):
    """Turns Gemma 2 into an encoder-decoder (arXiv 2504.06225).

    The encoder takes every weight of its Gemma 2; its self-attention only turns bidirectional. Each decoder block takes
    self-attention, feed-forward and their norms from the same layer of its Gemma 2. Adapted so, the encoder under a
    causal mask gives exactly its Gemma 2's hidden states, and the decoder without cross-attention's contribution
    exactly its Gemma 2's logits.

    Args:
        encoder: a Gemma 2: a folder in Hugging Face's or Keras's format, "hf://google/gemma-2-2b", a keras-hub preset
            such as "gemma2_9b_en", or a `keras_hub.models.GemmaBackbone` or `GemmaCausalLM`.
        decoder: the decoder's; the encoder's if left out.
        cross_attention: where cross-attention starts from. "self-attention": the decoder's own, layer by layer;
            "random": from scratch, to be trained alone for its first 1,000 steps (`CrossAttentionWarmup`); "auto", the
            paper's rule: the former where both Gemma 2 have the same configuration, else the latter.
        encoder_attention: "bidirectional", or "causal", an ablation in the paper.
        encoder_heads: "grouped" as in Gemma 2, or "multi", another: a key and value head for each query head, copied.
        seed: of what is drawn at random.
        **kwargs: `dtype`, `name`.

    Returns:
        A `T5GemmaBackbone`.

    Raises:
        ValueError: where an argument is none of these, a checkpoint is no Gemma 2, or the two do not fit.
        ConnectionError: where a download failed.

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
