"""A request: a prompt as arrays, and its options, checked in the thread that submits it."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_t5gemma.checks import integer, is_number
from keras_t5gemma.config import BOS_ID, UNKNOWN_ID
from keras_t5gemma.inference.arrays import prompt_arrays
from keras_t5gemma.inference.encode import EncodedPrompts, prompt_inputs, truncation_of
from keras_t5gemma.inference.generate import stop_ids
from keras_t5gemma.inference.samplers.top_k_top_p import generator_start
from keras_t5gemma.inference.stops import stop_texts
from keras_t5gemma.serving.rows import MOST_STOP_IDS, Rows
from keras_t5gemma.text.cuts import cuts_reported

# The length of the answers that compile the programs; the decoding program is the same for all lengths.
_WARM_LENGTH = 3


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        encoder_ids: int32 [N], the prompt.
        prompt: int32 [M], the decoder prompt.
        row: its options in a slot.
        stops: a tuple of stop strings.
        strip_prompt: whether the answer is without the decoder prompt.
        seed: as of `Answer`.
    """

    encoder_ids: np.ndarray
    prompt: np.ndarray
    row: Rows
    stops: tuple[str, ...]
    strip_prompt: bool
    seed: int | None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end the answer."""
        return tuple(i for i in self.row.stop_ids if i >= 0)


def read_request(
    lm,
    inputs: Any,
    *,
    longest_prompt: int,
    longest: int,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | str | None = "auto",
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    return_log_probs: bool = False,
    strip_prompt: bool = False,
    truncate: str | None = None,
) -> Request:
    """The `Request` for the arguments of `Batcher.submit`.

    Args:
        lm: the model.
        inputs: the prompt.
        longest_prompt: the largest bucket.
        longest: L, the positions of a slot.
        max_length: as for `submit`, and so on.

    Raises:
        ValueError: if an argument is invalid.
    """
    ids, prompt, limit = _arrays(lm, inputs, longest_prompt, longest, max_length, max_new_tokens, truncate)
    stops = stop_ids(lm, stop_token_ids) or ()
    if len(stops) > MOST_STOP_IDS:
        raise ValueError(f"`stop_token_ids` must be at most {MOST_STOP_IDS}. Received: {len(stops)}.")
    temperature = _number("temperature", temperature, least=0.0)
    size = lm.backbone.config.vocabulary_size
    top_k = integer(top_k, "top_k", optional=True, none_means="for all tokens")
    if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"`top_p` must be in (0, 1], or None for 1. Received: top_p={top_p!r}.")
    seed = integer(seed, "seed", least=0, optional=True)
    seed = None if not temperature else secrets.randbits(31) if seed is None else seed
    repetition = _number("repetition_penalty", repetition_penalty)
    if repetition <= 0:
        raise ValueError(
            f"`repetition_penalty` must be above 0; 1 changes nothing. Received: repetition_penalty={repetition!r}."
        )
    row = Rows(
        prompt_lengths=len(prompt),
        limits=limit,
        temperature=temperature,
        top_k=size if top_k is None else min(top_k, size),
        top_p=2.0 if top_p is None or top_p == 1 else top_p,
        starts=0 if seed is None else generator_start([seed, 0]),
        repetition_penalty=repetition,
        presence_penalty=_number("presence_penalty", presence_penalty),
        frequency_penalty=_number("frequency_penalty", frequency_penalty),
        log_probs=bool(return_log_probs),
        stop_ids=(*stops, *[-1] * (MOST_STOP_IDS - len(stops))),
    )
    return Request(ids, prompt, row, stop_texts(lm, stop), bool(strip_prompt), seed)


def longest_request(size: int, length: int) -> Request:
    """A request with a prompt of a size, for a few tokens, that compiles what requests of that size need."""
    row = Rows(1, min(length, _WARM_LENGTH), 0.0, 1, 2.0, 0, 1.0, 0.0, 0.0, False, (-1,) * MOST_STOP_IDS)
    return Request(np.full((size,), UNKNOWN_ID, "int32"), np.array([BOS_ID], "int32"), row, (), True, None)


def _arrays(lm, inputs, longest_prompt: int, longest: int, max_length, max_new_tokens, truncate) -> tuple:
    """`(ids, prompt, limit)`: the prompt's ids, those of the decoder prompt, and the maximum length in tokens."""
    if isinstance(inputs, EncodedPrompts):
        raise ValueError("A batcher encodes prompts itself. Pass texts or ids, not the result of `encode`.")
    max_length = integer(max_length, "max_length", optional=True)
    max_new_tokens = integer(max_new_tokens, "max_new_tokens", optional=True)
    if lm.preprocessor is not None:
        most = min(longest_prompt, lm.preprocessor.encoder_sequence_length)
        options = {"encoder_sequence_length": most, "sequence_length": max_length, **truncation_of(lm, truncate)}
        with cuts_reported():
            inputs = lm.preprocessor.generate_preprocess(inputs, **options)
    else:
        inputs = prompt_inputs(lm, inputs, truncate=truncate)
        given = isinstance(inputs, Mapping) and "decoder_token_ids" in inputs
        if max_length is None and max_new_tokens is None and not given:
            max_length = longest
    arrays = prompt_arrays(inputs, max_length, lm.backbone.config.vocabulary_size, max_new_tokens)
    if (count := len(arrays["encoder_token_ids"])) != 1:
        raise ValueError(f"`submit()` takes one prompt. Received: {count}. Submit each.")
    ids = arrays["encoder_token_ids"][0][arrays["encoder_padding_mask"][0] != 0]
    if len(ids) > longest_prompt:
        raise ValueError(
            f"The prompt takes {len(ids)} tokens, more than the batcher's largest bucket, {longest_prompt}. Shorten "
            f"it, or create the batcher with larger `buckets`."
        )
    limit = int(arrays["limits"][0])
    if max_length is None and max_new_tokens is None:
        limit = longest
    if limit > longest:
        raise ValueError(
            f"The answer may take {limit} tokens with its decoder prompt, more than the batcher's "
            f"max_length={longest}. Pass a smaller `max_length` or `max_new_tokens`, or create the batcher with a "
            f"larger `max_length`."
        )
    prompt = arrays["decoder_token_ids"][0][arrays["decoder_padding_mask"][0] != 0]
    if len(prompt) > limit:
        raise ValueError(f"The decoder prompt takes {len(prompt)} tokens, more than max_length={limit}.")
    return ids, prompt, limit


def _number(name: str, value, least: float | None = None) -> float:
    if not is_number(value) or (least is not None and value < least):
        bound = "" if least is None else f" from {least:g}"
        raise ValueError(f"`{name}` must be a number{bound}. Received: {name}={value!r}.")
    return float(value)
