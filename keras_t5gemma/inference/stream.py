"""`stream`: generated text, chunk by chunk."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from keras import ops

from keras_t5gemma.checks import integer
from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.arrays import prompt_arrays
from keras_t5gemma.inference.buckets import rounded_for
from keras_t5gemma.inference.decoding.chunks import DecodingStream, check_streamable, default_chunk_size
from keras_t5gemma.inference.decoding.programs import decoding_stream
from keras_t5gemma.inference.encode import prompt_inputs
from keras_t5gemma.inference.generate import control_of, stop_ids
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.samplers.top_k_top_p import Draws
from keras_t5gemma.inference.stops import AnswerText, stop_texts
from keras_t5gemma.text.cuts import cuts_reported


def stream(
    lm,
    inputs,
    max_length: int | None = None,
    stop_token_ids: Sequence[int] | str | None = "auto",
    strip_prompt: bool = False,
    *,
    stop: str | Sequence[str] | None = None,
    truncate: str | None = None,
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
        inputs: as for `generate`, one prompt, encoded or not.
        max_length: as for `generate`.
        stop_token_ids: as for `generate`.
        strip_prompt: as for `generate`.
        stop: as for `generate`. Text that may be the beginning of a stop string is held back until that is decided.
        truncate: as for `generate`.
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
    stops = stop_texts(lm, stop)
    options = {"stop_token_ids": stop_ids(lm, stop_token_ids), "processors": processors}
    with cuts_reported():
        inputs = prompt_inputs(lm, inputs, max_length=max_length, truncate=truncate)
    prompts = prompt_arrays(inputs, max_length, lm.backbone.config.vocabulary_size, max_new_tokens)
    if (rows := len(prompts["encoder_token_ids"])) != 1:
        raise ValueError(f"`stream()` takes one prompt at a time. Received: {rows}. `generate()` takes several.")
    prompt = prompts["decoder_token_ids"][prompts["decoder_padding_mask"] == 1]
    decode = decoding_stream(lm, control_of(lm, prompts, **options))
    chunks = _chunks(lm, decode, prompts, len(prompt), chunk_size, Draws(lm.sampler, seed))
    if lm.preprocessor is not None:
        return _texts(lm, None if strip_prompt else prompt, chunks, stops)
    chunks = chunks if strip_prompt else itertools.chain([prompt], chunks)
    return (int(i) for ids in chunks for i in ids)


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


def _next_chunk(lm, chunks: Iterator) -> np.ndarray | None:
    with reading(lm, "stream"):
        if (following := next(chunks, None)) is None:
            return None
        state, chunk = following
        return ops.convert_to_numpy(state.token_ids)[0, chunk]


def _texts(lm, prompt: np.ndarray | None, chunks: Iterator[np.ndarray], stops: Sequence[str]) -> Iterator[str]:
    """Yields the new whole characters of each chunk up to a stop string, without the ids that have no text.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        prompt: ids of the decoder prompt to begin with, or None.
        chunks: the chunks of `_chunks`.
        stops: the result of `stop_texts`.
    """
    text = AnswerText(lm.preprocessor, stops, prompt)
    if text.prompt:
        yield text.prompt
    with contextlib.closing(chunks):
        for ids in chunks:
            if new := text.add(ids):
                yield new
            if text.stopped:
                return
    if rest := text.finish():
        yield rest
