"""Decoding in chunks of tokens, for streams."""

import keras
from keras import ops

from keras_t5gemma.inference.decoding.loop import has_common_loop, run_tokens, start_state
from keras_t5gemma.inference.programs.compiled import Program

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
    if not has_common_loop(sampler):
        raise ValueError(
            f"`stream()` gives text that stands, and {type(sampler).__name__} knows its first token only with its "
            f'last. Use `generate()`, or compile the model with "greedy", "top_k", "top_p" or "random".'
        )


class DecodingStream:
    """`inference.decoding.loop.decode` for one prompt and in chunks: the same tokens.

    Two programs are compiled for a prompt's shapes, one that reads the prompt and one that decodes. The latter runs up
    to a position that it is given, so that chunks and limits of any size share it. Between chunks the state, which
    holds the cache, stays where it was computed, and each chunk overwrites that of the one before. The model itself
    holds nothing of a stream: one that is given up is garbage, and several may run in turn.

    Args:
        start: a `Program`, `inputs -> (token_ids [B, L], prompt_mask bool [B, L], cache)`, the prompt read but for its
            last token; the first row is the prompt's. Streams of other controls may share it.
        step: as for `decode`.
        sampler: a `keras_hub.samplers.Sampler` that passes `check_streamable`.
        model: the model whose variables `step` reads.
        control: the `Control` of a single sample.
    """

    def __init__(self, start, step, sampler, model, control):
        self._step = step
        self._sampler = sampler
        self._model = model
        self._control = control
        self._start = start
        # The sampler's loop reads the model's variables, and changes its own: the seeds.
        self._advance = Program(self._run_to, model, seeds=sampler.variables, donated=1, decodes=True)

    def __call__(self, inputs, positions, chunk_size, draws):
        """Decodes.

        Args:
            inputs: what `start` takes, and `limits`, int [1], the most tokens with the prompt.
            positions: a range, from the length of the decoder's prompt to the limit.
            chunk_size: tokens between two looks, a positive integer. The first chunk is one token, the next two, four,
                and so on up to this, so that the first token does not wait for others.
            draws: the `Draws` of this stream.

        Yields:
            int [N], the tokens of a chunk, `N >= 1`; the last one ends in a stop id, or with the range.
        """
        token_ids, prompt_mask, cache = self._start(inputs)
        limits = inputs["limits"]
        index, size = positions.start, 1
        state = start_state(token_ids, cache, index, limits)
        while index < positions.stop:
            end = min(index + size, positions.stop)
            state, draws.values = self._advance(state, prompt_mask, limits, end, seeds=draws.values)
            token_ids, _, reached, running, _ = state
            reached = int(ops.convert_to_numpy(reached))
            yield ops.convert_to_numpy(token_ids)[0, index:reached]
            if not ops.convert_to_numpy(running)[0]:
                return
            index, size = reached, min(2 * size, chunk_size)

    def _run_to(self, state, prompt_mask, limits, end):
        options = {"prompt_mask": prompt_mask, "limits": limits, "control": self._control, "model": self._model}
        return run_tokens(self._step, self._sampler, state, end, **options)
