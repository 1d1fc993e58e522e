"""`stream`: generated text as it comes."""

import itertools
from functools import partial

from keras import ops

from keras_t5gemma.checks import integer
from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.arrays import prompt_arrays
from keras_t5gemma.inference.buckets import rounded_for
from keras_t5gemma.inference.decoding.chunks import DecodingStream, check_streamable, default_chunk_size
from keras_t5gemma.inference.generate import control_of, decoding_step, stop_ids
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.inference.samplers.top_k_top_p import Draws
from keras_t5gemma.text.whole_characters import TextStream


def stream(
    lm,
    inputs,
    max_length=None,
    stop_token_ids="auto",
    strip_prompt=False,
    *,
    max_new_tokens=None,
    processors=(),
    seed=None,
    chunk_size=None,
):
    """Generates from one prompt, and gives what is there while the rest is still to come.

    Joined, it is what `generate()` gives for the same arguments, sampler and seed. A stream may be given up at any
    point, and others may run between two of its chunks.

    Args:
        inputs: as for `generate`, one prompt.
        max_length: as for `generate`.
        stop_token_ids: as for `generate`.
        strip_prompt: as for `generate`.
        max_new_tokens: as for `generate`.
        processors: as for `generate`.
        seed: as for `generate`.
        chunk_size: tokens decoded between two looks at them, beginning with 1, 2, 4, .... 8 where left out, or 1 on
            PyTorch; 1 shows each token at once, more cost less time.

    Returns:
        An iterator of strings that are never empty and hold whole characters only; without a preprocessor of ids.

    Raises:
        ValueError: as for `generate`, at once; for several prompts; for a `chunk_size` that is no positive integer;
            and for beam search and contrastive search, whose first token stands only with the last.
        MemoryError: as for `generate`, when the iterator begins.
    """
    chunk_size = integer(default_chunk_size() if chunk_size is None else chunk_size, "chunk_size")
    check_streamable(lm.sampler)
    options = {"stop_token_ids": stop_ids(lm, stop_token_ids), "processors": processors}
    if lm.preprocessor is not None:
        inputs = lm.preprocessor.generate_preprocess(inputs, sequence_length=max_length)
    prompts = prompt_arrays(inputs, max_length, lm.backbone.config.vocabulary_size, max_new_tokens)
    if (rows := len(prompts["encoder_token_ids"])) != 1:
        raise ValueError(f"`stream()` takes one prompt at a time. Received: {rows}. `generate()` takes several.")
    prompt = prompts["decoder_token_ids"][prompts["decoder_padding_mask"] == 1]
    decode = decoding_stream(lm, control_of(lm, prompts, **options))
    chunks = _chunks(lm, decode, prompts, len(prompt), chunk_size, Draws(lm.sampler, seed))
    chunks = chunks if strip_prompt else itertools.chain([prompt], chunks)
    return (int(i) for ids in chunks for i in ids) if lm.preprocessor is None else _texts(lm, chunks)


def decoding_stream(lm, control):
    """The compiled parts of a stream for a `Control`."""

    def make():
        start = lm.programs.get(("start",), lambda: Program(partial(_start_decoding, lm), lm))
        return DecodingStream(start, lm.recorded_step, lm.sampler, lm, control)

    return lm.programs.get(("stream", control), make)


def _chunks(lm, decode, prompts, start, chunk_size, draws):
    """What a `DecodingStream` gives for prompts of one row and `start` tokens."""
    arrays = rounded_for(lm, prompts, most_rows=1)
    positions = range(start, prompts["limits"][0])
    with memory_errors_explained(lm, prompts, arrays, caches=1), draws:
        chunks = decode(arrays, positions, chunk_size, draws)
        # Not between two chunks: who reads the stream may train meanwhile.
        while (ids := _next_chunk(lm, chunks)) is not None:
            yield ids


def _next_chunk(lm, chunks):
    with reading(lm, "stream"):
        return next(chunks, None)


def _start_decoding(lm, inputs):
    """`(token_ids, prompt_mask, cache)` of a prompt that was read; see `DecodingStream`."""
    encoder_mask, token_ids = inputs["encoder_padding_mask"], inputs["decoder_token_ids"]
    encoder_output = lm.backbone.encoder(inputs["encoder_token_ids"], encoder_mask, training=False)
    prefill = inputs["prefill"].shape[0]
    cache = lm.backbone.decoder.start_cache(encoder_output, encoder_mask, token_ids.shape[1], prefill)
    if prefill:
        _, _, cache = decoding_step(lm, token_ids[:, :prefill], cache, 0)
    return token_ids, ops.cast(inputs["decoder_padding_mask"], "bool"), cache


def _texts(lm, chunks):
    text = TextStream(lm.preprocessor.tokenizer.detokenize)
    for ids in chunks:
        if new := text.add(ids[lm.preprocessor.has_text(ids)].tolist()):
            yield new
    if rest := text.finish():
        yield rest
