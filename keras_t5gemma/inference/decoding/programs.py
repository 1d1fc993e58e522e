"""The programs of a model that decode in chunks, and its decoding step."""

from functools import partial

from keras import ops

from keras_t5gemma.inference.decoding.chunks import DecodingStream
from keras_t5gemma.inference.decoding.loop import Control, repeated
from keras_t5gemma.inference.programs.compiled import Program


def decoding_stream(lm, control: Control) -> DecodingStream:
    """The compiled parts of a `DecodingStream` for a `Control`."""
    samples = control.num_samples

    def new_stream():
        start = lm.programs.get(("start", samples), lambda: Program(partial(start_decoding, lm, samples=samples), lm))
        return DecodingStream(start, lm.recorded_step, lm.sampler, lm, control)

    return lm.programs.get(("stream", control), new_stream)


def start_decoding(lm, inputs: dict, samples: int = 1) -> tuple:
    """Reads prompts.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: as for `generate_step`, with `prefill` and `limits`.
        samples: n, rows per prompt.

    Returns:
        `(token_ids, prompt_mask, limits, cache)` of B n rows; see `DecodingStream`.
    """
    token_ids, prefill = inputs["decoder_token_ids"], inputs["prefill"].shape[0]
    encoder_output, encoder_mask = encoder_output_of(lm, inputs)
    cache = lm.backbone.decoder.start_cache(encoder_output, encoder_mask, token_ids.shape[1], prefill)
    if prefill:
        _, _, cache = decoding_step(lm, token_ids[:, :prefill], cache, 0)
    prompt_mask = ops.cast(inputs["decoder_padding_mask"], "bool")
    return repeated((token_ids, prompt_mask, inputs["limits"], cache), samples)


def encoder_output_of(lm, inputs: dict) -> tuple:
    """`(output [B, S, E], mask [B, S])` of the encoder for a program's inputs, which may contain its output already."""
    mask = inputs["encoder_padding_mask"]
    if "encoder_output" in inputs:
        return inputs["encoder_output"], mask
    return lm.backbone.encoder(inputs["encoder_token_ids"], mask, training=False), mask


def decoding_step(lm, token_ids, cache, index):
    """One decoding step.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        token_ids: int [B, T].
        cache: nested structure of tensors; see `Decoder.start_cache`.
        index: the position of the first token, or of single tokens a position per row, int [B].

    Returns:
        `(logits [B, T, V], hidden states [B, T, D], cache)`.
    """
    hidden, cache = lm.backbone.decoder.step(token_ids, ops.ones_like(token_ids), cache, index)
    return lm.head(hidden), hidden, cache
