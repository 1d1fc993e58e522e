"""`stream`: generated text, chunk by chunk."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from keras import ops

from keras_t5gemma.checks import integer
from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.arrays import prompt_arrays
from keras_t5gemma.inference.buckets import rounded_for
from keras_t5gemma.inference.decoding.chunks import DecodingStream, check_streamable, default_chunk_size
from keras_t5gemma.inference.decoding.loop import Control
from keras_t5gemma.inference.generate import control_of, decoding_step, stop_ids
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.inference.samplers.top_k_top_p import Draws
from keras_t5gemma.text.whole_characters import TextStream


def stream(
    lm,
    inputs,
    max_length: int | None = None,
    stop_token_ids: Sequence[int] | str | None = "auto",
    strip_prompt: bool = False,
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    processors: Sequence[Callable] = (),
    seed: int | None = None,
    chunk_size: int | None = None,
) -> Iterator[str] | Iterator[int]:
    """Generates from one prompt, and yields the text while the rest is being generated.

    The concatenated pieces equal the result of `generate()` for the same arguments, sampler and seed. A stream may be
    abandoned at any point, and other streams may run between two of its chunks.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: as for `generate`, one prompt.
        max_length: as for `generate`.
        stop_token_ids: as for `generate`.
        strip_prompt: as for `generate`.
        max_new_tokens: as for `generate`.
        processors: as for `generate`.
        seed: as for `generate`.
        chunk_size: tokens per chunk; the first chunks have 1, 2, 4, ... tokens. 8 if left out, or 1 on PyTorch. With 1
            each token is returned at once; larger chunks take less time in total.

    Returns:
        An iterator of strings that are never empty and hold whole characters only; without a preprocessor, of ids.

    Raises:
        ValueError: as for `generate`, raised by the call itself; if there are several prompts; if `chunk_size` is not a
            positive integer; or if the sampler is a beam search or a contrastive search, which decide the first token
            only with the last.
        MemoryError: as for `generate`, raised when the iteration begins.
    """
    chunk_size = integer(default_chunk_size() if chunk_size is None else chunk_size, "chunk_size")
    max_length = integer(max_length, "max_length", optional=True)
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


def decoding_stream(lm, control: Control) -> DecodingStream:
    """The compiled parts of a stream for a `Control`."""

    def new_stream():
        start = lm.programs.get(("start",), lambda: Program(partial(_start_decoding, lm), lm))
        return DecodingStream(start, lm.recorded_step, lm.sampler, lm, control)

    return lm.programs.get(("stream", control), new_stream)


def _chunks(
    lm, decode: DecodingStream, prompts: dict[str, np.ndarray], start: int, chunk_size: int, draws: Draws
) -> Iterator[np.ndarray]:
    """Yields the chunks, int [N], of a `DecodingStream` for prompts of one row and `start` tokens."""
    arrays = rounded_for(lm, prompts, most_rows=1)
    positions = range(start, prompts["limits"][0])
    with memory_errors_explained(lm, prompts, arrays, caches=1), draws:
        chunks = decode(arrays, positions, chunk_size, draws)
        # `reading` is held per chunk: the user may train between two chunks.
        while (ids := _next_chunk(lm, chunks)) is not None:
            yield ids


def _next_chunk(lm, chunks: Iterator[np.ndarray]) -> np.ndarray | None:
    with reading(lm, "stream"):
        return next(chunks, None)


def _start_decoding(lm, inputs):
    """Reads the prompt and returns `(token_ids, prompt_mask, cache)`; see `DecodingStream`."""
    encoder_mask, token_ids = inputs["encoder_padding_mask"], inputs["decoder_token_ids"]
    encoder_output = lm.backbone.encoder(inputs["encoder_token_ids"], encoder_mask, training=False)
    prefill = inputs["prefill"].shape[0]
    cache = lm.backbone.decoder.start_cache(encoder_output, encoder_mask, token_ids.shape[1], prefill)
    if prefill:
        _, _, cache = decoding_step(lm, token_ids[:, :prefill], cache, 0)
    return token_ids, ops.cast(inputs["decoder_padding_mask"], "bool"), cache


def _texts(lm, chunks: Iterator[np.ndarray]) -> Iterator[str]:
    """Yields the new whole characters of each chunk, without the ids that have no text."""
    text = TextStream(lm.preprocessor.tokenizer.detokenize)
    for ids in chunks:
        if new := text.add(ids[lm.preprocessor.has_text(ids)].tolist()):
            yield new
    if rest := text.finish():
        yield rest
