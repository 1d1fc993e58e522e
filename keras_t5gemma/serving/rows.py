"""Options of the requests in the slots, as arrays with one number per slot."""

from typing import Any, NamedTuple

import numpy as np

# Stop ids per request; the arrays have this width.
MOST_STOP_IDS = 8


class Rows(NamedTuple):
    """Options per slot: arrays [B] on the host, tensors within a program.

    Attributes:
        prompt_lengths: int32, tokens of the decoder prompt.
        limits: int32, the maximum length in tokens with the decoder prompt; 0 for a slot that does not run.
        temperature: float32, 0 for the likeliest token at each step.
        top_k: int32, at most V; V for all tokens.
        top_p: float32; 2 for all tokens.
        starts: int32, the first number of the state of the row's random generator.
        repetition_penalty: float32, 1 for none.
        presence_penalty: float32, 0 for none.
        frequency_penalty: float32, 0 for none.
        log_probs: bool, whether log-probabilities are wanted.
        stop_ids: int32 [B, MOST_STOP_IDS], -1 where there is none.
    """

    prompt_lengths: Any
    limits: Any
    temperature: Any
    top_k: Any
    top_p: Any
    starts: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    log_probs: Any
    stop_ids: Any


# Of a free slot; `limits` of 0 keeps it from running.
_FREE = Rows(1, 0, 0.0, 1, 2.0, 0, 1.0, 0.0, 0.0, False, (-1,) * MOST_STOP_IDS)
_DTYPES = Rows(*["int32"] * 2, "float32", "int32", "float32", "int32", *["float32"] * 3, "bool", "int32")


def rows_of(slots: int) -> Rows:
    """The `Rows` of free slots."""
    return Rows(*(np.array([value] * slots, dtype) for value, dtype in zip(_FREE, _DTYPES, strict=True)))


def set_row(rows: Rows, slot: int, options: Rows = _FREE) -> None:
    """Writes the options of a request into the arrays, or frees the slot."""
    for array, value in zip(rows, options, strict=True):
        array[slot] = value
