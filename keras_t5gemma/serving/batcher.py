"""`Batcher`: many requests at a time, each answered as if it were alone."""

import weakref
from collections.abc import Sequence
from typing import Any, Self

from keras_t5gemma.checks import integer
from keras_t5gemma.inference.buckets import Buckets
from keras_t5gemma.inference.decoding.chunks import default_chunk_size
from keras_t5gemma.serving.handles import Handle
from keras_t5gemma.serving.model_thread import ModelThread
from keras_t5gemma.serving.requests import longest_request, read_request


class Batcher:
    """Answers requests from any number of threads with continuous batching.

    Requests share one decoding batch of B slots. A request that ends makes room for the next one at once, and others go
    on. An answer does not depend on who shares the batch, nor on the order of arrival.

        slot 0   A A A A A D D D D D D
        slot 1   B B B B B B B B B E E
        slot 2   C C F F F F F F F F F         -> time; D waited for A, F for C, E for B

    The prompt is padded to one of a few lengths. All other options are numbers per slot, so that the programs are a
    fixed set: one per bucket, which encodes a prompt into a slot, and one that decodes all slots. A thread of its own
    runs them. `generate` may be called meanwhile. If another thread is in `fit`, requests fail with its `RuntimeError`.

    Memory: keys and values for B prompts of the largest bucket and B answers of `max_length`.

    Args:
        lm: a `T5GemmaSeq2SeqLM`. Its sampler is not used; each request has its own `temperature`, `top_k` and `top_p`.
        slots: B, requests that are decoded at a time.
        buckets: sizes of prompts in tokens, ascending. A prompt is padded to the smallest that holds it; one that is
            longer than the largest is an error. Sizes are capped at the preprocessor's `encoder_sequence_length`; a
            quarter of this and all of it if left out.
        max_length: L, the longest answer in tokens with its decoder prompt; the preprocessor's
            `decoder_sequence_length` if left out.
        most_waiting: the most requests that wait for a slot.
        chunk_size: the most steps between two looks at the queue, and between two pieces of a streamed text. 8 if left
            out, or 1 on PyTorch.

    Raises:
        ValueError: if an argument is invalid, or left out for a model without a preprocessor.

    Example:
        >>> with kt.Batcher(lm, slots=16) as batcher:
        ...     handles = [batcher.submit(prompt, max_new_tokens=64) for prompt in prompts]
        ...     texts = [handle.result().text for handle in handles]
    """

    def __init__(
        self,
        lm,
        *,
        slots: int = 8,
        buckets: Sequence[int] | None = None,
        max_length: int | None = None,
        most_waiting: int = 64,
        chunk_size: int | None = None,
    ):
        preprocessor = lm.preprocessor
        if preprocessor is None and (buckets is None or max_length is None):
            raise ValueError(
                f"A model without a preprocessor has no lengths of its own: pass `buckets` and `max_length`. Received: "
                f"buckets={buckets!r}, max_length={max_length!r}."
            )
        longest = integer(preprocessor.decoder_sequence_length if max_length is None else max_length, "max_length")
        self._lm = lm
        self._buckets = _sizes(buckets, None if preprocessor is None else preprocessor.encoder_sequence_length)
        self._length = longest
        self._thread = ModelThread(
            lm,
            integer(slots, "slots"),
            self._buckets,
            longest,
            integer(default_chunk_size() if chunk_size is None else chunk_size, "chunk_size"),
            integer(most_waiting, "most_waiting"),
        )
        # A batcher that is forgotten, or open when the program ends, fails what is left.
        weakref.finalize(self, self._thread.abandon)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The sizes of prompts in tokens, ascending."""
        return self._buckets

    @property
    def max_length(self) -> int:
        """L, the longest answer in tokens with its decoder prompt."""
        return self._length

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return self._thread.counts()[0]

    @property
    def running(self) -> int:
        """The number of requests that have a slot."""
        return self._thread.counts()[1]

    def submit(
        self,
        inputs: Any,
        *,
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
    ) -> Handle:
        """Adds a request; returns at once. May be called from any thread.

        Args:
            inputs: one prompt, as for `generate`: a string, a conversation, a dict of `encoder_text` and
                `decoder_text`, or without a preprocessor a dict of ids.
            max_length: the maximum length in tokens with the decoder prompt; the batcher's if left out.
            max_new_tokens: instead of `max_length`, how many tokens may follow the decoder prompt.
            temperature: 0 for the likeliest token at each step, or what logits are divided by before a random draw.
            top_k: the number of likeliest tokens to draw from; None for all.
            top_p: as the p of `TopKTopPSampler`; None for 1.
            seed: determines the draws, together with the token's place in the answer; random if left out. The answer is
                that of `generate(prompt, seed=seed)` with a `TopKTopPSampler`, up to draws on the edge between two
                tokens. On TensorFlow under XLA and on a GPU it is another one, as reproducible.
            stop: as for `generate`.
            stop_token_ids: as for `generate`, at most 8.
            repetition_penalty: as for `RepetitionPenalty`; 1 for none.
            presence_penalty: subtracted from the logits of tokens that the answer has already.
            frequency_penalty: subtracted from a token's logits as often as the answer has it already.
            return_log_probs: whether the answer has each token's log-probability: the model's own, before penalties and
                temperature.
            strip_prompt: whether to leave the decoder prompt out of the answer.
            truncate: as for `generate`.

        Returns:
            A `Handle`.

        Raises:
            ValueError: if the prompt is empty or too long, or an option is out of range.
            QueueFull: if `most_waiting` requests wait already.
            BatcherClosed: if the batcher is closed.
        """
        request = read_request(
            self._lm,
            inputs,
            longest_prompt=self._buckets[-1],
            longest=self._length,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            return_log_probs=return_log_probs,
            strip_prompt=strip_prompt,
            truncate=truncate,
        )
        return self._thread.submit(request)

    def warm(self) -> None:
        """Compiles all programs: answers one prompt per bucket with a few tokens.

        Raises:
            BatcherClosed: if the batcher is closed.
            Exception: any error of the model, such as a `MemoryError`.
        """
        requests = [longest_request(size, self._length) for size in self._buckets]
        for handle in [self._thread.submit(request, always=True) for request in requests]:
            handle.result()

    def close(self, timeout: float | None = None) -> None:
        """Takes no more requests, answers the open ones, and ends the thread. May be called again.

        Args:
            timeout: seconds for what is open; what is left then fails with `BatcherClosed`. None to answer everything.
        """
        self._thread.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error, *_) -> None:
        # After an error nobody waits for answers.
        self.close(None if error is None else 0)


def _sizes(buckets: Sequence[int] | None, limit: int | None) -> tuple[int, ...]:
    """The sizes of prompts, capped at the limit."""
    if buckets is None:
        assert limit is not None
        buckets = (max(1, limit // 4), limit) if limit > 1 else (1,)
    sizes = Buckets(encoder=tuple(buckets)).encoder
    assert sizes is not None
    return tuple(sorted({size if limit is None else min(size, limit) for size in sizes}))
