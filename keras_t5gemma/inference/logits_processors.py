"""Logits processors: change which token may come next. They compose, and work with every sampler.

A processor is any callable `(logits, sequences) -> logits`. Those here are frozen: equal ones share a compiled program.
"Sequence" is the decoder's, its prompt included, as in `transformers`, whose numbers these give.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_t5gemma.checks import check_integer_fields, integers, is_number


@dataclasses.dataclass(frozen=True)
class Sequences:
    """What a processor may look at. R rows: B, or as many as a search keeps for B examples.

    Attributes:
        token_ids: int [R, L]; what stands at `index` and after it is no part of the sequences yet.
        index: the position that the logits are for, a scalar.
        prompt_lengths: int [R]; a row whose prompt is longer than `index` takes its next token from there anyway.
        limits: int [R], the most tokens of a row, its prompt included.
        stop_token_ids: a tuple of the ids that end a row, or None.
    """

    token_ids: Any
    index: Any
    prompt_lengths: Any
    limits: Any
    stop_token_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What one call of `generate` asks, for processors to check themselves against.

    Attributes:
        vocabulary_size: V.
        rooms: int [B], the most tokens each row may get.
        stop_token_ids: a tuple of ids, or None.
    """

    vocabulary_size: int
    rooms: np.ndarray
    stop_token_ids: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Makes tokens that the sequence has less likely: their logits are divided where above 0, multiplied where below.

    From CTRL (arXiv 1909.05858).

    Args:
        penalty: above 1 discourages, below 1 encourages; 1.2 in the paper.

    Raises:
        ValueError: where `penalty` is not positive.
    """

    penalty: float

    def __post_init__(self):
        if not is_number(self.penalty) or not self.penalty > 0:
            raise ValueError(f"`penalty` must be above 0; 1 changes nothing. Received: penalty={self.penalty!r}.")

    def __call__(self, logits, sequences):
        """Logits [R, V] as [R, V]."""
        ids = sequences.token_ids
        there = ops.broadcast_to(ops.arange(ids.shape[1], dtype="int32") < sequences.index, ids.shape)
        penalised = ops.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return ops.where(_listed(ids, there, logits.shape[1]), penalised, logits)


@dataclasses.dataclass(frozen=True)
class NoRepeatNgrams:
    """Forbids each token that would complete an n-gram that the sequence has already.

    Args:
        n: tokens of an n-gram; with 1 no token comes twice.

    Raises:
        ValueError: where `n` is not a positive integer.
    """

    n: int

    def __post_init__(self):
        check_integer_fields(self, n=1)

    def __call__(self, logits, sequences):
        """Logits [R, V] as [R, V]."""
        ids, index = sequences.token_ids, sequences.index
        windows = ids.shape[1] - self.n + 1
        if windows < 1:
            return logits
        # A window is complete where its last token is there already. Where fewer than n tokens are, none is.
        matches = ops.broadcast_to(ops.arange(windows, dtype="int32") + self.n - 1 < index, (ids.shape[0], windows))
        for i in range(self.n - 1):
            last = ops.take(ids, ops.maximum(index - (self.n - 1) + i, 0), axis=1)
            matches = ops.logical_and(matches, ops.equal(ids[:, i : i + windows], ops.expand_dims(last, 1)))
        return _without(logits, _listed(ids[:, self.n - 1 :], matches, logits.shape[1]))


@dataclasses.dataclass(frozen=True)
class ForbiddenTokens:
    """Forbids tokens everywhere.

    Args:
        ids: a sequence of ids.

    Raises:
        ValueError: where `ids` is empty or holds other than ids.
    """

    ids: tuple[int, ...]

    def __post_init__(self):
        ids = tuple(sorted(set(integers(self.ids, "ids"))))
        if not ids:
            raise ValueError("`ids` must hold at least one id. Received: none.")
        object.__setattr__(self, "ids", ids)

    def check(self, request):
        """Raises a ValueError where ids are outside the vocabulary or leave none of it."""
        _check_ids(self.ids, "ForbiddenTokens", request)
        if len(self.ids) == request.vocabulary_size:
            raise ValueError("`ForbiddenTokens` must leave at least one id. Received: the whole vocabulary.")

    def __call__(self, logits, sequences):  # noqa: ARG002 a processor's arguments
        """Logits [R, V] as [R, V]."""
        return _without(logits, _one_of(self.ids, logits.shape[1]))


@dataclasses.dataclass(frozen=True)
class MinimumLength:
    """Forbids the ids at which `generate` stops until there are enough tokens.

    Args:
        tokens: the least number of new tokens, without the prompt and the one that ends it.

    Raises:
        ValueError: where `tokens` is not a positive integer.
    """

    tokens: int

    def __post_init__(self):
        check_integer_fields(self, tokens=1)

    def check(self, request):
        """Raises a ValueError where a row has no room for so many."""
        if self.tokens > request.rooms.min():
            raise ValueError(
                f"`MinimumLength` asks for {self.tokens} tokens, and `max_length` or `max_new_tokens` leaves room for "
                f"{request.rooms.min()} in a row. Ask for fewer, or leave more room."
            )

    def __call__(self, logits, sequences):
        """Logits [R, V] as [R, V]."""
        if not sequences.stop_token_ids:
            return logits
        short = ops.expand_dims(sequences.index - sequences.prompt_lengths < self.tokens, 1)
        return _without(logits, ops.logical_and(short, _one_of(sequences.stop_token_ids, logits.shape[1])))


@dataclasses.dataclass(frozen=True)
class ForcedTokens:
    """Leaves one choice at some positions; `generate` applies it after all others, since they might forbid that one.

    Args:
        tokens: a mapping of positions to ids. 0 is the first new token, 1 the next; -1 the last that a row has room
            for, which only rows that did not stop before reach.

    Raises:
        ValueError: where `tokens` is empty or no such mapping.
    """

    tokens: Mapping[int, int]

    def __post_init__(self):
        if not isinstance(self.tokens, Mapping) or not self.tokens:
            raise ValueError(f"`tokens` must map positions to ids, e.g. {{0: 106}}. Received: {self.tokens!r}.")
        positions, ids = integers(self.tokens, "tokens"), integers(self.tokens.values(), "tokens")
        # Hashable, and the same for equal mappings.
        object.__setattr__(self, "tokens", tuple(sorted(zip(positions, ids, strict=True))))

    def check(self, request):
        """Raises a ValueError where an id is outside the vocabulary or a position beyond every row's room."""
        _check_ids([token for _, token in self.tokens], "ForcedTokens", request)
        most = request.rooms.max()
        if outside := [position for position, _ in self.tokens if not -most <= position < most]:
            raise ValueError(
                f"`ForcedTokens` has positions that no row reaches, of {most} tokens. Received: {outside}."
            )

    def __call__(self, logits, sequences):
        """Logits [R, V] as [R, V]: 0 for what is forced, -inf for the rest."""
        for position, token in self.tokens:
            start = sequences.prompt_lengths if position >= 0 else sequences.limits
            here = ops.expand_dims(ops.equal(start + position, sequences.index), 1)
            forced = ops.where(_one_of((token,), logits.shape[1]), 0.0, -float("inf"))
            logits = ops.where(here, ops.cast(forced, logits.dtype), logits)
        return logits


def in_order(processors):
    """A tuple of processors as `generate` applies them: as given, but with those that force tokens last."""
    return tuple(sorted(processors, key=lambda processor: isinstance(processor, ForcedTokens)))


def check_processors(processors, request):
    """Checks processors against what else is asked, and against each other.

    Args:
        processors: a list or tuple of callables.
        request: a `Request`.

    Raises:
        ValueError: where that is no list of callables, an id is outside the vocabulary, a length has no room, or two
            processors contradict each other.
    """
    is_list = isinstance(processors, (list, tuple))
    if not is_list or not all(callable(one) and not isinstance(one, type) for one in processors):
        raise ValueError(
            f"`processors` must be a list of callables such as kt.RepetitionPenalty(1.2). Received: {processors!r}."
        )
    for processor in processors:
        if hasattr(processor, "check"):
            processor.check(request)
    forced = [pair for one in processors if isinstance(one, ForcedTokens) for pair in one.tokens]
    forbidden = {token for one in processors if isinstance(one, ForbiddenTokens) for token in one.ids}
    if both := sorted({token for _, token in forced} & forbidden):
        raise ValueError(f"`ForcedTokens` and `ForbiddenTokens` contradict each other. Received in both: {both}.")
    least = max((one.tokens for one in processors if isinstance(one, MinimumLength)), default=0)
    stops = set(request.stop_token_ids or ())
    if early := [(position, token) for position, token in forced if token in stops and 0 <= position < least]:
        raise ValueError(
            f"`ForcedTokens` ends a row before `MinimumLength({least})` lets it end. Received (position, id): {early}."
        )


def _listed(ids, keep, vocabulary_size):
    """bool [R, V]: whether a row of ids [R, M] has the token at a place where keep, bool [R, M], is True."""
    rows, places = ids.shape
    # What is not kept goes to a column of its own. All updates are alike, so it does not matter which comes last.
    columns = ops.where(keep, ops.cast(ids, "int32"), vocabulary_size)
    where = ops.stack([ops.repeat(ops.arange(rows, dtype="int32"), places), ops.reshape(columns, (-1,))], axis=1)
    marks = ops.zeros((rows, vocabulary_size + 1), "int32")
    return ops.scatter_update(marks, where, ops.ones((rows * places,), "int32"))[:, :vocabulary_size] > 0


def _one_of(ids, vocabulary_size):
    """bool [1, V], True at the ids."""
    mask = np.zeros((1, vocabulary_size), bool)
    mask[:, list(ids)] = True
    return ops.convert_to_tensor(mask, "bool")


def _without(logits, forbidden):
    return ops.where(forbidden, ops.cast(-float("inf"), logits.dtype), logits)


def _check_ids(ids, name, request):
    if outside := [token for token in ids if not 0 <= token < request.vocabulary_size]:
        raise ValueError(f"`{name}` must hold ids in [0, {request.vocabulary_size}). Received: {outside}.")
