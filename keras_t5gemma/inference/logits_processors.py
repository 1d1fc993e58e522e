"""Logits processors: change which token may come next. They compose, and work with every sampler.

A processor is any callable `(logits, sequences) -> logits`. The processors of this module are frozen dataclasses: equal
ones share a compiled program. A "sequence" is the decoder's, its prompt included, as in `transformers`; the numbers
equal those of `transformers`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_t5gemma.checks import check_integer_fields, integers, is_number


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences that a processor sees: R rows, which are B, or in a beam search B times the beams.

    Attributes:
        token_ids: int [R, L]; the tokens from `index` on are not part of the sequences yet.
        index: the position of the logits, a scalar.
        prompt_lengths: int [R]; a row whose prompt is longer than `index` takes its next token from the prompt anyway.
        limits: int [R], the maximum length of each row in tokens, its prompt included.
        stop_token_ids: a tuple of the ids that end a row, or None.
    """

    token_ids: Any
    index: Any
    prompt_lengths: Any
    limits: Any
    stop_token_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of one `generate` call that processors check their arguments against.

    Attributes:
        vocabulary_size: V.
        rooms: int [B], the maximum number of new tokens of each row.
        stop_token_ids: a tuple of ids, or None.
    """

    vocabulary_size: int
    rooms: np.ndarray
    stop_token_ids: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Makes tokens that occur in the sequence less likely: divides their logits if positive, multiplies if negative.

    From CTRL (arXiv 1909.05858).

    Args:
        penalty: above 1 discourages repetition, below 1 encourages it; 1.2 in the paper.

    Raises:
        ValueError: if `penalty` is not positive.
    """

    penalty: float

    def __post_init__(self):
        if not is_number(self.penalty) or not self.penalty > 0:
            raise ValueError(f"`penalty` must be above 0; 1 changes nothing. Received: penalty={self.penalty!r}.")

    def __call__(self, logits, sequences):
        """Penalizes: logits [R, V] to logits [R, V]."""
        ids = sequences.token_ids
        is_past = ops.broadcast_to(ops.arange(ids.shape[1], dtype="int32") < sequences.index, ids.shape)
        penalized = ops.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return ops.where(_occurring(ids, is_past, logits.shape[1]), penalized, logits)


@dataclasses.dataclass(frozen=True)
class NoRepeatNgrams:
    """Forbids each token that would complete an n-gram that occurs in the sequence already.

    Args:
        n: tokens per n-gram; with 1 no token occurs twice.

    Raises:
        ValueError: if `n` is not a positive integer.
    """

    n: int

    def __post_init__(self):
        check_integer_fields(self, n=1)

    def __call__(self, logits, sequences):
        """Forbids repeated n-grams: logits [R, V] to logits [R, V]."""
        ids, index = sequences.token_ids, sequences.index
        windows = ids.shape[1] - self.n + 1
        if windows < 1:
            return logits
        # A window is complete if its last token is before `index`. With fewer than n tokens there is no such window.
        matches = ops.broadcast_to(ops.arange(windows, dtype="int32") + self.n - 1 < index, (ids.shape[0], windows))
        for i in range(self.n - 1):
            last = ops.take(ids, ops.maximum(index - (self.n - 1) + i, 0), axis=1)
            matches = ops.logical_and(matches, ops.equal(ids[:, i : i + windows], ops.expand_dims(last, 1)))
        return _forbid(logits, _occurring(ids[:, self.n - 1 :], matches, logits.shape[1]))


@dataclasses.dataclass(frozen=True)
class ForbiddenTokens:
    """Forbids tokens everywhere.

    Args:
        ids: a sequence of ids.

    Raises:
        ValueError: if `ids` is empty or an item is not an id.
    """

    ids: tuple[int, ...]

    def __post_init__(self):
        ids = tuple(sorted(set(integers(self.ids, "ids"))))
        if not ids:
            raise ValueError("`ids` must hold at least one id. Received: none.")
        object.__setattr__(self, "ids", ids)

    def check(self, request: Request) -> None:
        """Raises a ValueError if ids are outside the vocabulary or forbid all of it."""
        _check_ids(self.ids, "ForbiddenTokens", request)
        if len(self.ids) == request.vocabulary_size:
            raise ValueError("`ForbiddenTokens` must leave at least one id. Received: the whole vocabulary.")

    def __call__(self, logits, sequences):  # noqa: ARG002 a processor's arguments
        """Forbids the ids: logits [R, V] to logits [R, V]."""
        return _forbid(logits, _vocabulary_mask(self.ids, logits.shape[1]))


@dataclasses.dataclass(frozen=True)
class MinimumLength:
    """Forbids the stop ids of `generate` until there are enough tokens.

    Args:
        tokens: the minimum number of new tokens, without the prompt and the stop id.

    Raises:
        ValueError: if `tokens` is not a positive integer.
    """

    tokens: int

    def __post_init__(self):
        check_integer_fields(self, tokens=1)

    def check(self, request: Request) -> None:
        """Raises a ValueError if a row has room for fewer tokens."""
        if self.tokens > request.rooms.min():
            raise ValueError(
                f"`MinimumLength` asks for {self.tokens} tokens, and `max_length` or `max_new_tokens` leaves room for "
                f"{request.rooms.min()} in a row. Ask for fewer, or leave more room."
            )

    def __call__(self, logits, sequences):
        """Forbids the stop ids in rows that are too short: logits [R, V] to logits [R, V]."""
        if not sequences.stop_token_ids:
            return logits
        too_short = ops.expand_dims(sequences.index - sequences.prompt_lengths < self.tokens, 1)
        stops = _vocabulary_mask(sequences.stop_token_ids, logits.shape[1])
        return _forbid(logits, ops.logical_and(too_short, stops))


@dataclasses.dataclass(frozen=True)
class ForcedTokens:
    """Forces tokens at some positions.

    `generate` applies it after all other processors, which might forbid those tokens.

    Args:
        tokens: a mapping of positions to ids. 0 is the first new token, 1 the next; -1 the last that a row has room
            for, which only rows that did not stop before reach.

    Raises:
        ValueError: if `tokens` is empty or is not a mapping of positions to ids.
    """

    tokens: Mapping[int, int]

    def __post_init__(self):
        if not isinstance(self.tokens, Mapping) or not self.tokens:
            raise ValueError(f"`tokens` must map positions to ids, e.g. {{0: 106}}. Received: {self.tokens!r}.")
        positions, ids = integers(self.tokens, "tokens"), integers(self.tokens.values(), "tokens")
        # Hashable, and the same for equal mappings.
        object.__setattr__(self, "tokens", tuple(sorted(zip(positions, ids, strict=True))))

    def check(self, request: Request) -> None:
        """Raises a ValueError if an id is outside the vocabulary or a position is beyond every row's room."""
        _check_ids([token for _, token in self.tokens], "ForcedTokens", request)
        most = request.rooms.max()
        if outside := [position for position, _ in self.tokens if not -most <= position < most]:
            raise ValueError(
                f"`ForcedTokens` has positions that no row reaches, of {most} tokens. Received: {outside}."
            )

    def __call__(self, logits, sequences):
        """Forces tokens: logits [R, V] to logits [R, V], with 0 for a forced token and -inf for the others."""
        for position, token in self.tokens:
            start = sequences.prompt_lengths if position >= 0 else sequences.limits
            is_position = ops.expand_dims(ops.equal(start + position, sequences.index), 1)
            forced = ops.where(_vocabulary_mask((token,), logits.shape[1]), 0.0, -float("inf"))
            logits = ops.where(is_position, ops.cast(forced, logits.dtype), logits)
        return logits


def application_order(processors: Iterable[Callable]) -> tuple[Callable, ...]:
    """The order in which `generate` applies processors: the user's, but with `ForcedTokens` last."""
    return tuple(sorted(processors, key=lambda processor: isinstance(processor, ForcedTokens)))


def check_processors(processors: Sequence[Callable], request: Request) -> None:
    """Checks processors against the request and against each other.

    Args:
        processors: a list or tuple of callables.
        request: a `Request`.

    Raises:
        ValueError: if `processors` is not a list of callables, an id is outside the vocabulary, a row has too little
            room, or two processors contradict each other.
    """
    is_list = isinstance(processors, (list, tuple))
    if not is_list or not all(callable(item) and not isinstance(item, type) for item in processors):
        raise ValueError(
            f"`processors` must be a list of callables such as kt.RepetitionPenalty(1.2). Received: {processors!r}."
        )
    for processor in processors:
        if hasattr(processor, "check"):
            processor.check(request)
    forced = [pair for processor in processors if isinstance(processor, ForcedTokens) for pair in processor.tokens]
    forbidden = {token for processor in processors if isinstance(processor, ForbiddenTokens) for token in processor.ids}
    if both := sorted({token for _, token in forced} & forbidden):
        raise ValueError(f"`ForcedTokens` and `ForbiddenTokens` contradict each other. Received in both: {both}.")
    least = max((processor.tokens for processor in processors if isinstance(processor, MinimumLength)), default=0)
    stops = set(request.stop_token_ids or ())
    if early := [(position, token) for position, token in forced if token in stops and 0 <= position < least]:
        raise ValueError(
            f"`ForcedTokens` ends a row before `MinimumLength({least})` lets it end. Received (position, id): {early}."
        )


def _occurring(ids, keep, vocabulary_size):
    """The tokens that occur in each row, at the positions that count.

    Args:
        ids: int [R, M].
        keep: bool [R, M], True at positions that count.
        vocabulary_size: V.

    Returns:
        bool [R, V].
    """
    rows, positions = ids.shape
    # Positions that do not count are marked in an extra column. All updates are equal, so their order does not matter.
    columns = ops.where(keep, ops.cast(ids, "int32"), vocabulary_size)
    indices = ops.stack([ops.repeat(ops.arange(rows, dtype="int32"), positions), ops.reshape(columns, (-1,))], axis=1)
    marks = ops.zeros((rows, vocabulary_size + 1), "int32")
    return ops.scatter_update(marks, indices, ops.ones((rows * positions,), "int32"))[:, :vocabulary_size] > 0


def _vocabulary_mask(ids: Iterable[int], vocabulary_size: int):
    """bool [1, V], True at the ids."""
    mask = np.zeros((1, vocabulary_size), bool)
    mask[:, list(ids)] = True
    return ops.convert_to_tensor(mask, "bool")


def _forbid(logits, forbidden):
    """Logits with -inf where `forbidden` is True."""
    return ops.where(forbidden, ops.cast(-float("inf"), logits.dtype), logits)


def _check_ids(ids: Iterable[int], name: str, request: Request) -> None:
    """Raises a ValueError that names the processor if an id is outside the vocabulary."""
    if outside := [token for token in ids if not 0 <= token < request.vocabulary_size]:
        raise ValueError(f"`{name}` must hold ids in [0, {request.vocabulary_size}). Received: {outside}.")
