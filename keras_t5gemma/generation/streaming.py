"""Decoding in chunks, so that what is there can be seen before the rest is."""

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_t5gemma.generation.program import Program
from keras_t5gemma.generation.stopping import is_stop

# Tokens between two looks at what came, on the backends that compile: each look costs a millisecond or so, as much as
# a step of a small model on an accelerator. On PyTorch Python runs between two steps anyway.
_COMPILED_CHUNK_SIZE = 8


def default_chunk_size():
    """Tokens a chunk where the user does not say: 8 on the backends that compile, 1 on PyTorch."""
    return 1 if keras.config.backend() == "torch" else _COMPILED_CHUNK_SIZE


def check_streamable(sampler):
    """Refuses a sampler that does not choose its tokens one after the other for good.

    Raises:
        ValueError: for beam search and contrastive search, which may yet take back what they had; the message says
            what would work.
    """
    if type(sampler).__call__ is not keras_hub.samplers.Sampler.__call__:
        raise ValueError(
            f"`stream()` gives text that stands, and {type(sampler).__name__} knows its first token only with its "
            f'last. Use `generate()`, or compile the model with "greedy", "top_k", "top_p" or "random".'
        )


class DecodingStream:
    """`generation.decode.decode` in chunks: the same tokens for the same sampler, seeds and prompt.

    Two programs are compiled for a prompt's shapes, one that reads the prompt and one that decodes. The latter runs up
    to a position that it is given, so that chunks of any size share it. Between chunks the state, which holds the
    cache, stays where it was computed, and each chunk overwrites that of the one before. The model itself holds
    nothing of a stream: one that is given up is garbage, and several may run in turn.

    Args:
        start: `inputs -> (token_ids [1, L], cache)`, the prompt read but for its last token.
        step: as for `decode`.
        sampler: a `keras_hub.samplers.Sampler` that passes `check_streamable`.
        model: the model whose variables `start` and `step` read.
        stop_token_ids: ids that end it, or None.
    """

    def __init__(self, start, step, sampler, model, stop_token_ids):
        self._step = step
        self._sampler = sampler
        self._model = model
        self._stop_token_ids = stop_token_ids
        self._start = Program(start, model)
        # The sampler's loop reads the model's variables, and changes its own: the seeds.
        self._advance = Program(self._run_to, model, seeds=sampler.variables, donated=1)

    def __call__(self, inputs, prompt_length, chunk_size):
        """Decodes.

        Args:
            inputs: what `start` takes.
            prompt_length: tokens of the decoder's prompt.
            chunk_size: tokens between two looks, a positive integer. The first chunk is one token, the next two, four,
                and so on up to this, so that the first token does not wait for others.

        Yields:
            int [N], the tokens of a chunk, `N >= 1`; the last one ends in a stop id, or at position L.
        """
        token_ids, cache = self._start(inputs)
        length = token_ids.shape[1]
        state = {"token_ids": token_ids, "cache": cache}
        index, size = prompt_length, 1
        while index < length:
            state, reached = self._advance(state, prompt_length, index, min(index + size, length))
            reached = int(ops.convert_to_numpy(reached))
            chunk = ops.convert_to_numpy(state["token_ids"])[0, index:reached]
            yield chunk
            if np.isin(chunk, self._stop_token_ids or ()).any():
                return
            index, size = reached, min(2 * size, chunk_size)

    def _run_to(self, state, prompt_length, index, end):
        """The loop of `keras_hub.samplers.Sampler.__call__`, from position `index` to `end` and with its cache kept."""

        def cond(token_ids, _, index):
            last = ops.slice(token_ids, [0, index - 1], [1, 1])
            # A stop id in the prompt ends nothing.
            stopped = ops.logical_and(is_stop(last, self._stop_token_ids), index > prompt_length)
            return ops.logical_and(index < end, ops.logical_not(ops.squeeze(stopped)))

        def body(token_ids, cache, index):
            last = ops.slice(token_ids, [0, index - 1], [1, 1])
            logits, _, cache = self._step(last, cache, index - 1)
            token = self._sampler.get_next_token(self._sampler.compute_probabilities(ops.squeeze(logits, 1)))
            token = ops.cast(ops.expand_dims(token, 1), token_ids.dtype)
            return ops.slice_update(token_ids, [0, index], token), cache, index + 1

        token_ids, cache, index = self._sampler.run_loop(
            cond, body, model=self._model, loop_vars=(state["token_ids"], state["cache"], ops.cast(index, "int32"))
        )
        return {"token_ids": token_ids, "cache": cache}, index
