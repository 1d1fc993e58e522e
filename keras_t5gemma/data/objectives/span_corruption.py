"""Span corruption (T5, arXiv 1910.10683, section 3.3.4): holes in the inputs, their contents in the targets."""

import bisect
import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checks import check_integer_fields
from keras_t5gemma.data.objectives.example import Example, check_ids
from keras_t5gemma.data.objectives.noise_masks import corrupt, mask_around, random_mask
from keras_t5gemma.suggestions import check_choice

# `<unused0>` .. `<unused98>` in Gemma's vocabulary. The sentinels of the released UL2 checkpoints are not published.
GEMMA_SENTINELS = range(7, 106)
# `<pad>`, `<eos>`, `<bos>`, `<start_of_turn>` and `<end_of_turn>` in Gemma's vocabulary.
GEMMA_CONTROL_IDS = (0, 1, 2, 106, 107)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The corruption rate of a sequence and the mean length of its spans.

    Attributes:
        mean_span: mean length of a corrupted span, in tokens; `None` for one span at the end of the sequence (UL2's
            S-denoiser, which equals a mean span of `rate` times the length).
        rate: share of corrupted tokens, in (0, 1).

    Raises:
        ValueError: if a value is out of range.
    """

    mean_span: float | None
    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"`rate` must be between 0 and 1. Received: rate={self.rate!r}.")
        if self.mean_span is not None and not self.mean_span >= 1:
            raise ValueError(f"`mean_span` must be at least 1, or None. Received: mean_span={self.mean_span!r}.")

    @property
    def mode(self) -> str:
        """UL2's name for this kind of denoiser: "R", "S" or "X" (arXiv 2205.05131: "X" from 12 tokens or 30% on)."""
        if self.mean_span is None:
            return "S"
        return "X" if self.mean_span >= 12 or self.rate >= 0.3 else "R"

    def counts(self, length: int, max_spans: int | None = None) -> tuple[int, int]:
        """Numbers of corrupted tokens and of spans in `length` tokens, as a pair.

        At least one token is corrupted and one is not. Each span needs a token of its own on either side, so high
        rates and short sequences get fewer, longer spans, and so do sequences with more than `max_spans` spans. Halves
        round to even, as in T5's code.
        """
        noise = min(max(round(length * self.rate), 1), length - 1)
        spans = 1 if self.mean_span is None else round(noise / self.mean_span)
        return noise, min(max(spans, 1), noise, length - noise, max_spans or noise)

    def lengths(self, length: int, max_spans: int | None = None) -> tuple[int, int]:
        """Lengths of inputs and of targets of `length` tokens, as a pair. Both include one sentinel per span."""
        noise, spans = self.counts(length, max_spans)
        return length - noise + spans, noise + spans

    def raw_length(
        self, encoder_length: int, decoder_length: int, max_spans: int | None = None, *, merge: bool = False
    ) -> int:
        """The maximum number of tokens whose inputs and targets fit, so that inputs fill the encoder (T5's rule).

        >>> Denoiser(mean_span=3, rate=0.15).raw_length(512 - 1, 512 - 1)  # T5 keeps one place for <eos>
        568

        Args:
            encoder_length: places for the inputs.
            decoder_length: places for the targets.
            max_spans: the number of sentinels; `None` for no limit.
            merge: if the sentinels do not suffice: whether spans become longer, rather than the sequence shorter.

        Returns:
            L, or 1 if not even two tokens fit.
        """

        # Inputs, targets and spans grow with the length, so the lengths that fit come first.
        def too_long(length: int) -> bool:
            inputs, targets = self.lengths(length, max_spans if merge else None)
            spans = self.counts(length)[1]
            lacks_sentinels = max_spans is not None and not merge and spans > max_spans
            return inputs > encoder_length or targets > decoder_length or lacks_sentinels

        longest = encoder_length + decoder_length
        return 1 + bisect.bisect_left(range(2, longest + 1), True, key=too_long)

    def noise_mask(self, length: int, rng: np.random.Generator, max_spans: int | None = None) -> np.ndarray:
        """Draws the corrupted tokens of a sequence.

        Args:
            length: L.
            rng: a `numpy.random.Generator`.
            max_spans: as for `counts`, which says how many tokens and spans are corrupted.

        Returns:
            bool [L], see `noise_masks.random_mask`.
        """
        return random_mask(length, *self.counts(length, max_spans), rng)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """An objective with one denoiser.

    >>> objective = SpanCorruption(Denoiser(2, 0.5), encoder_length=8, decoder_length=8, sentinels=[7, 8, 9])
    >>> objective(np.arange(51, 59), np.random.default_rng(0))

    gives, with two spans of two tokens on average,

        ids         51 52 53 54 55 56 57 58
        inputs      51 52 53  7 56  8
        targets      7 54 55  8 57 58      and <eos> in the labels

    Each token is exactly once in the inputs or the targets. The targets are complete: `<eos>` follows them, as in T5,
    because the last hole is filled then. The inputs get no `<eos>`, and neither do the inputs of `generate`.

    A sentinel is never used twice in an example. If there are too few, `raw_length` is limited by their number, so the
    spans keep their length but the inputs do not fill the encoder; a warning says so. A wider range of `sentinels`
    removes the limit. `too_few_sentinels="merge"` keeps the raw length, with fewer and longer spans.

    Control ids are never corrupted: `protected`, the sentinels and the mode token stay in the inputs, and spans lie
    between them (`noise_masks.mask_around`). The suffix of a denoiser without mean span is exempt: its text goes on in
    the targets, `<eos>` and turns included, as in `PrefixLM`. Protected ids may lie so close together that the spans
    between them do not fit encoder and decoder. Only then are tokens left out of the example, from the end of the
    sequence.

    Attributes:
        denoiser: a `Denoiser`.
        encoder_length: S, places for the inputs.
        decoder_length: T, places for the targets and `<eos>`.
        sentinels: distinct ids, used in order from the first.
        mode_token: an id before the inputs, which takes one place of S; `None` for no such id.
        protected: further ids that are never corrupted; by default Gemma's pad, eos, bos and turn tokens.
        too_few_sentinels: "cap" to limit the raw length, or "merge" for longer spans.

    Raises:
        ValueError: if a value is out of range.
    """

    denoiser: Denoiser
    encoder_length: int
    decoder_length: int
    _: dataclasses.KW_ONLY
    sentinels: Sequence[int] = GEMMA_SENTINELS
    mode_token: int | None = None
    protected: Sequence[int] = GEMMA_CONTROL_IDS
    too_few_sentinels: str = "cap"

    closes_targets = True

    def __post_init__(self) -> None:
        """Checks the fields, and warns if too few sentinels limit the raw length."""
        # The least is two raw tokens: one stays and one is corrupted, each beside a sentinel.
        check_integer_fields(self, encoder_length=2 + (self.mode_token is not None), decoder_length=3)
        sentinels = _as_ids("sentinels", self.sentinels)
        if not sentinels.size:
            raise ValueError(f"`sentinels` must be token ids, at least one. Received: {self.sentinels!r}.")
        if len(np.unique(sentinels)) < len(sentinels):
            raise ValueError(f"`sentinels` must be distinct, non-negative ids. Received: {self.sentinels!r}.")
        _as_ids("protected", self.protected)
        if self.mode_token is not None and self.mode_token in sentinels:
            raise ValueError(f"`mode_token` must not be a sentinel. Received: mode_token={self.mode_token}.")
        check_choice(self.too_few_sentinels, "too_few_sentinels", ("cap", "merge"))
        unlimited = self._raw_length(None)
        if self.too_few_sentinels == "cap" and self.raw_length < unlimited:
            inputs = self.denoiser.lengths(self.raw_length)[0]
            warn_caller(
                f"{self.denoiser} takes {self.raw_length} tokens at a time instead of {unlimited}, because there are "
                f"only {len(sentinels)} sentinels: its inputs take {inputs} of encoder_length={self.encoder_length} "
                f'places. Pass more ids as `sentinels`, too_few_sentinels="merge", or use shorter lengths.'
            )

    @cached_property
    def raw_length(self) -> int:
        """The maximum number of ids of a call."""
        return self._raw_length(len(self.sentinels))

    @property
    def parts(self) -> "tuple[tuple[SpanCorruption, int], ...]":
        """The objective itself, with weight 1: see `Example`."""
        return ((self, 1),)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> Example:
        """Corrupts a sequence.

        Args:
            ids: [L], 2 to `raw_length` of them.
            rng: a `numpy.random.Generator`.

        Returns:
            An `Example`.

        Raises:
            ValueError: if there are fewer or more ids, or all of them are protected.
        """
        ids = check_ids(ids, self.raw_length, self.denoiser)
        protected = self._is_protected.take(ids, mode="clip")
        if self.denoiser.mean_span is None or not protected.any():
            mask = self.denoiser.noise_mask(len(ids), rng, len(self.sentinels))
        else:
            ids, mask = self._fit_around(ids, protected, rng)
        inputs, targets = corrupt(ids, mask, self._sentinel_ids)
        if self.mode_token is not None:
            inputs = np.append(np.int32(self.mode_token), inputs)
        return Example(inputs, targets, complete=True)

    def _fit_around(
        self, ids: np.ndarray, protected: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids and a noise mask that avoids protected ids. Cuts ids off the end until inputs and targets fit."""
        while True:
            if protected.all():
                raise ValueError(f"All {len(ids)} ids are protected: there is nothing to corrupt. Received: {ids}.")
            counts = self.denoiser.counts(len(ids), len(self.sentinels))
            mask = mask_around(protected, *counts, len(self.sentinels), rng)
            noise = np.count_nonzero(mask)
            spans = np.count_nonzero(mask[1:] > mask[:-1]) + mask[0]
            places = self.encoder_length - (self.mode_token is not None)
            excess = max(len(ids) - noise + spans - places, noise + spans - (self.decoder_length - 1))
            if excess <= 0:
                return ids, mask
            ids, protected = ids[:-excess], protected[:-excess]

    @cached_property
    def _sentinel_ids(self) -> np.ndarray:
        return np.asarray(self.sentinels, "int32")

    @cached_property
    def _is_protected(self) -> np.ndarray:
        """Bools by id. Ids beyond the end take the last entry, which is False."""
        ids = [*self.protected, *self.sentinels, *([] if self.mode_token is None else [self.mode_token])]
        table = np.zeros(max(ids) + 2, bool)
        table[ids] = True
        return table

    def _raw_length(self, max_spans: int | None) -> int:
        places = self.encoder_length - (self.mode_token is not None)
        merge = self.too_few_sentinels == "merge"
        return self.denoiser.raw_length(places, self.decoder_length - 1, max_spans, merge=merge)


def _as_ids(name: str, ids: Sequence[int]) -> np.ndarray:
    """Ids of an argument as an array, once they are checked."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and (array.dtype.kind not in "iu" or array.min() < 0)):
        raise ValueError(f"`{name}` must be token ids, distinct and not negative. Received: {ids!r}.")
    return array
