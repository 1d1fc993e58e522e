"""The slots of a batcher: rows of one decoding batch, each at a position of its own, and the programs that fill them.

slot        0               1              2
request     A, token 7      -              B, token 2
insert      A               C, token 0     B              one program per bucket of prompts: encode, write the row
advance     A, token 8      C, token 1     B, token 3     one program: a step of all rows, in a loop
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from keras import ops, tree

from keras_t5gemma.inference.decoding.loop import token_log_probs
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.kernels.cache_update import write_at
from keras_t5gemma.serving.draws import next_tokens, penalized
from keras_t5gemma.serving.rows import Rows


class SlotState(NamedTuple):
    """State of B slots, on the device: L positions per slot.

    Attributes:
        token_ids: int32 [B, L], the decoder prompt and the answer so far.
        cache: as from `Decoder.start_cache`; prompts have the length of the largest bucket.
        index: int32 [B], the next position to fill.
        running: bool [B], False if the row has ended or the slot is free.
        log_probs: float32 [B, L].
    """

    token_ids: Any
    cache: Any
    index: Any
    running: Any
    log_probs: Any


class SlotPrograms:
    """The programs of a batcher.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        slots: B.
        encoder_length: S, the largest bucket.
        length: L, the longest answer with its decoder prompt.
    """

    def __init__(self, lm, slots: int, encoder_length: int, length: int):
        self._lm = lm
        self._slots = slots
        self._encoder_length = encoder_length
        self._length = length
        self._start = Program(self._start_state, lm)
        self._insert = Program(self._inserted, lm, donated=1)
        self._advance = Program(self._advanced, lm, donated=1, decodes=True)

    def start(self) -> SlotState:
        """The state in which every slot is free."""
        return self._start()

    def insert(self, state: SlotState, slot: int, encoder_ids: np.ndarray, prompt: np.ndarray, bucket: int):
        """Encodes a prompt into a slot.

        Args:
            state: the state, which the caller must not use again.
            slot: a free slot.
            encoder_ids: int [N], the prompt, at most `bucket`.
            prompt: int [M], the decoder prompt, at least `<bos>`.
            bucket: the size to which the prompt is padded.

        Returns:
            The new `SlotState`.
        """
        ids, mask, token_ids = (np.zeros((1, size), "int32") for size in (bucket, bucket, self._length))
        ids[0, : len(encoder_ids)], mask[0, : len(encoder_ids)] = encoder_ids, 1
        token_ids[0, : len(prompt)] = prompt
        return self._insert(state, np.int32(slot), ids, mask, token_ids)

    def advance(self, state: SlotState, rows: Rows, count: int, *, is_awaited: bool) -> SlotState:
        """Decodes up to `count` tokens per slot.

        Args:
            state: the state, which the caller must not use again.
            rows: the slots' options.
            count: the number of steps.
            is_awaited: whether to return as soon as a row ends, because a request waits for its slot.

        Returns:
            The new `SlotState`.
        """
        return self._advance(state, rows, np.int32(count), np.bool_(is_awaited))

    def _start_state(self) -> SlotState:
        config = self._lm.backbone.config
        output = ops.zeros((1, self._encoder_length, config.encoder.hidden_dim), self._lm.backbone.compute_dtype)
        row = self._row(output, ops.zeros((1, self._encoder_length), "int32"), ops.zeros((1, self._length), "int32"))
        state = tree.map_structure(lambda x: ops.zeros((self._slots, *x.shape[1:]), x.dtype), row)
        # A step reads the token before its index, also in a free slot.
        return SlotState(state.token_ids, state.cache, state.index + 1, state.running, state.log_probs)

    def _row(self, encoder_output, encoder_mask, token_ids) -> SlotState:
        """The state [1, ...] of a request before its first token."""
        # One position per step, the first `<bos>`: a longer decoder prompt is read in the same loop as all answers.
        cache = self._lm.backbone.decoder.start_cache(encoder_output, encoder_mask, self._length, 1)
        added = self._encoder_length - encoder_mask.shape[1]
        for layer in cache["layers"]:
            layer["cross"] = {
                name: ops.pad(x, [(0, 0)] * 2 + [(0, added), (0, 0)]) for name, x in layer["cross"].items()
            }
        cache["encoder_segments"] = ops.pad(cache["encoder_segments"], [(0, 0), (0, added)])
        log_probs = ops.zeros(token_ids.shape, "float32")
        return SlotState(token_ids, cache, ops.ones((1,), "int32"), ops.ones((1,), "bool"), log_probs)

    def _inserted(self, state: SlotState, slot, encoder_ids, encoder_mask, token_ids) -> SlotState:
        output = self._lm.backbone.encoder(encoder_ids, encoder_mask, training=False)
        # The whole row is written, so that nothing of the slot's last request remains.
        row = self._row(output, encoder_mask, token_ids)
        return tree.map_structure(lambda buffer, x: write_at(buffer, x, slot, axis=0), state, row)

    def _advanced(self, state: SlotState, rows: Rows, count, is_awaited) -> SlotState:
        started = ops.logical_and(state.running, state.index < rows.limits)

        # `while_loop` passes the fields one by one.
        def cond(*fields):
            running = SlotState(*fields).running
            has_ended = ops.any(ops.logical_and(started, ops.logical_not(running)))
            stops = ops.logical_and(is_awaited, has_ended)
            return ops.logical_and(ops.any(running), ops.logical_not(stops))

        def body(*fields):
            return tuple(self._stepped(SlotState(*fields), rows))

        fields = state.token_ids, state.cache, state.index, started, state.log_probs
        return SlotState(*ops.while_loop(cond, body, fields, maximum_iterations=count))

    def _stepped(self, state: SlotState, rows: Rows) -> SlotState:
        """The state after one step. A row that has ended repeats its step and keeps its tokens."""
        token_ids, cache, index, running, log_probs = state
        at = partial(ops.expand_dims, axis=1)
        logits, _, cache = self._lm.recorded_step(_at(token_ids, index - 1), cache, index - 1)
        logits = ops.squeeze(logits, 1)
        position = ops.minimum(index, token_ids.shape[1] - 1)
        from_prompt = index < rows.prompt_lengths
        chosen = next_tokens(penalized(logits, token_ids, index, rows), index, rows)
        keeps = ops.logical_or(from_prompt, ops.logical_not(running))
        chosen = ops.where(keeps, _at(token_ids, position)[:, 0], chosen)
        token_ids = write_at(token_ids, at(chosen), position)

        def scored():
            new = ops.where(at(running), token_log_probs(logits, at(chosen)), _at(log_probs, position))
            return write_at(log_probs, new, position)

        log_probs = ops.cond(ops.any(rows.log_probs), scored, lambda: log_probs)
        is_stop = ops.logical_and(ops.any(rows.stop_ids == at(chosen), axis=1), ops.logical_not(from_prompt))
        goes_on = ops.logical_and(ops.logical_not(is_stop), index + 1 < rows.limits)
        index = ops.where(running, index + 1, index)
        return SlotState(token_ids, cache, index, ops.logical_and(running, goes_on), log_probs)


def _at(x, positions):
    """[B, 1] of x [B, L], at the position of each row."""
    return ops.take_along_axis(x, ops.expand_dims(positions, 1), axis=1)
