"""Decoding in chunks of tokens, for streams and for stop strings."""

from collections.abc import Iterator

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_t5gemma._keras_internals import tensor_of
from keras_t5gemma.inference.decoding.loop import Control, DecodingState, has_common_loop, run_tokens, start_state
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.inference.samplers.top_k_top_p import Draws

# Tokens per chunk. To fetch a chunk takes about a millisecond, as long as one step of a small model on an accelerator.
CHUNK_SIZE = 8


def default_chunk_size() -> int:
    """Tokens per chunk of a stream if the user does not set it: 8 on the backends that compile, 1 on PyTorch.

    On PyTorch Python runs between two steps anyway.
    """
    return 1 if keras.config.backend() == "torch" else CHUNK_SIZE


def check_streamable(sampler: keras_hub.samplers.Sampler) -> None:
    """Checks that a sampler never revises a token that it has chosen, so that its tokens can be streamed.

    Raises:
        ValueError: if the sampler is a beam search or a contrastive search, which may revise earlier tokens; the
            message names samplers that work.
    """
    if not has_common_loop(sampler):
        raise ValueError(
            f"`stream()` needs a sampler that never revises a token, and {type(sampler).__name__} decides its first "
            f'token only with its last. Use `generate()`, or compile the model with "greedy", "top_k", "top_p" or '
            f'"random".'
        )


class DecodingStream:
    """`inference.decoding.loop.decode` in chunks: the same tokens.

    Two programs are compiled per shape of prompts: one reads the prompts, the other decodes. The latter takes the end
    position as an argument, so that chunks and limits of any size share it. Between chunks the state, which holds the
    cache, stays on the device, and each chunk overwrites the state of the chunk before. The model itself holds no state
    of a stream: an abandoned stream is garbage-collected, and several streams may run in turn.

    Args:
        start: a `Program`, `inputs -> (token_ids [R, L], prompt_mask bool [R, L], limits [R], cache)`, which reads the
            prompts without their last tokens. R is B n, n samples per prompt. Streams with different controls may share
            it.
        step: as for `decode`.
        sampler: a `keras_hub.samplers.Sampler` that passes `check_streamable`.
        model: the model whose variables `step` reads.
        control: a `Control`.
    """

    def __init__(self, start: Program, step, sampler: keras_hub.samplers.Sampler, model: keras.Model, control: Control):
        self._step = step
        self._sampler = sampler
        self._model = model
        self._control = control
        self._start = start
        # The sampler's loop reads the model's variables, and changes the sampler's own: the seeds.
        self._advance = Program(self._run_to, model, seeds=sampler.variables, donated=1, decodes=True)

    def __call__(
        self, inputs: dict, positions: range, chunk_size: int, draws: Draws, ended: np.ndarray | None = None
    ) -> Iterator[tuple[DecodingState, slice]]:
        """Decodes until every row has ended.

        Args:
            inputs: the inputs of `start`, among them `limits`, int [B], the maximum length in tokens with the prompt.
            positions: from the length of the shortest decoder prompt to the largest limit.
            chunk_size: tokens per chunk, a positive integer. The first chunk is one token, the next two, four, and so
                on up to this, so that the first token does not wait for others.
            draws: the `Draws` of this stream.
            ended: bool [R], or None. The caller may set rows to True between two chunks to end them.

        Yields:
            `(state, chunk)`: the state, which is valid until the next chunk, and the chunk's positions, at least one.
        """
        token_ids, prompt_mask, limits, cache = self._start(inputs)
        index, size = positions.start, 1
        state = start_state(token_ids, cache, index, limits, log_probs=self._control.log_probs)
        while index < positions.stop:
            end = min(index + size, positions.stop)
            state, draws.values = self._advance(state, prompt_mask, limits, end, seeds=draws.values)
            chunk_end = int(ops.convert_to_numpy(state.index))
            yield state, slice(index, chunk_end)
            running = ops.convert_to_numpy(state.running)
            if not (running if ended is None else running & ~ended).any():
                return
            if ended is not None and (running & ended).any():
                limits = ops.where(tensor_of(ended), 0, limits)
            index, size = chunk_end, min(2 * size, chunk_size)

    def _run_to(self, state: DecodingState, prompt_mask, limits, end) -> DecodingState:
        # A row that its caller has ended has a limit of 0 by now.
        running = ops.logical_and(state.running, state.index < limits)
        state = DecodingState(state.token_ids, state.cache, state.index, running, state.log_probs)
        options = {"prompt_mask": prompt_mask, "limits": limits, "control": self._control, "model": self._model}
        return run_tokens(self._step, self._sampler, state, end, **options)
