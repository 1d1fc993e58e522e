"""Span corruption (T5, arXiv 1910.10683, section 3.3.4): holes in the inputs, their contents in the targets."""

import bisect
import dataclasses
import warnings
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from keras_t5gemma.checks import check_integer_fields
from keras_t5gemma.data.objectives.example import Example, check_ids
from keras_t5gemma.data.objectives.noise_masks import corrupt, mask_around, random_mask
from keras_t5gemma.suggestions import check_choice

# `<unused0>` .. `<unused98>` in Gemma's vocabulary. The sentinels of the released UL2 checkpoints are not published.
GEMMA_SENTINELS = range(7, 106)
# `<pad>`, `<eos>`, `<bos>`, `<start_of_turn>` and `<end_of_turn>` there.
GEMMA_CONTROL_IDS = (0, 1, 2, 106, 107)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """How much of a sequence is corrupted, and in how long spans.

    Attributes:
        mean_span: mean length of a corrupted span, in tokens; `None` for one span that is the sequence's end (UL2's
            S-denoiser, which equals a mean span of `rate` times the length).
        rate: share of the tokens that is corrupted, in (0, 1).

    Raises:
        ValueError: if a value is out of range.
    """

    mean_span: float | None
    rate: float

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise ValueError(f"`rate` must be between 0 and 1. Received: rate={self.rate!r}.")
        if self.mean_span is not None and not self.mean_span >= 1:
            raise ValueError(f"`mean_span` must be at least 1, or None. Received: mean_span={self.mean_span!r}.")

    @property
    def mode(self):
        """UL2's name for its kind: "R", "S" or "X" (arXiv 2205.05131: "X" from 12 tokens or 30% on)."""
        if self.mean_span is None:
            return "S"
        return "X" if self.mean_span >= 12 or self.rate >= 0.3 else "R"

    def counts(self, length, max_spans=None):
        """(corrupted tokens, spans) in `length` tokens.

        At least one token is corrupted and one is not. Each span needs a token of its own on either side, so high
        rates and short sequences get fewer, longer spans, and so do those with more spans than `max_spans`. Halves
        round to even, as in T5's code.
        """
        noise = min(max(round(length * self.rate), 1), length - 1)
        spans = 1 if self.mean_span is None else round(noise / self.mean_span)
        return noise, min(max(spans, 1), noise, length - noise, max_spans or noise)

    def lengths(self, length, max_spans=None):
        """(inputs, targets) that `length` tokens become, one sentinel a span on either side included."""
        noise, spans = self.counts(length, max_spans)
        return length - noise + spans, noise + spans

    def raw_length(self, encoder_length, decoder_length, max_spans=None, *, merge=False):
        """The most tokens whose inputs and targets fit: so that inputs fill the encoder (T5's rule).

        >>> Denoiser(mean_span=3, rate=0.15).raw_length(512 - 1, 512 - 1)  # T5 keeps one place for <eos>
        568

        Args:
            encoder_length: places for the inputs.
            decoder_length: places for the targets.
            max_spans: the most spans there are sentinels for; `None` for no limit.
            merge: whether more tokens than those make longer spans; else they are too many.

        Returns:
            L, or 1 where not even two tokens fit.
        """

        # All three grow with the length, so the lengths that fit come first.
        def too_long(length):
            inputs, targets = self.lengths(length, max_spans if merge else None)
            spans = self.counts(length)[1]
            runs_out = max_spans is not None and not merge and spans > max_spans
            return inputs > encoder_length or targets > decoder_length or runs_out

        longest = encoder_length + decoder_length
        return 1 + bisect.bisect_left(range(2, longest + 1), True, key=too_long)

    def noise_mask(self, length, rng, max_spans=None):
        """Which of `length` tokens are corrupted, bool [L]: `counts` of them, by `spans.random_mask`."""
        return random_mask(length, *self.counts(length, max_spans), rng)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """One denoiser as an objective.

    >>> objective = SpanCorruption(Denoiser(2, 0.5), encoder_length=8, decoder_length=8, sentinels=[7, 8, 9])
    >>> objective(np.arange(51, 59), np.random.default_rng(0))

    gives, with two spans of two tokens on average,

        ids         51 52 53 54 55 56 57 58
        inputs      51 52 53  7 56  8
        targets      7 54 55  8 57 58      and <eos> in the labels

    Every token lands exactly once in inputs or targets. The targets are complete: `<eos>` follows them, as in T5,
    because the last hole is filled then. The inputs get no `<eos>`: `generate` feeds the encoder none either.

    A sentinel is never used twice in an example. Where there are too few, `raw_length` stops where they run out, so
    that the recipe's spans keep their length and inputs do not fill the encoder; a warning says so. Wider `sentinels`
    lift it; `too_few_sentinels="merge"` keeps the length, and makes the spans fewer and longer instead.

    Control ids are never corrupted: `protected`, the sentinels and the mode token stay in the inputs, and spans lie
    between them (`spans.mask_around`). The suffix of a denoiser without mean span is exempt: its text goes on in the
    targets, `<eos>` and turns included, as in `PrefixLM`. Where protected ids lie so close that the spans between
    them do not fit encoder and decoder, the sequence's last ids are left out until they do: only then is not every
    token in the example.

    Attributes:
        denoiser: a `Denoiser`.
        encoder_length: S, places for the inputs.
        decoder_length: T, places for the targets and `<eos>`.
        sentinels: distinct ids, used in their order from the first.
        mode_token: an id that stands first in the inputs, within S; `None` for none.
        protected: further ids that are never corrupted; by default Gemma's pad, eos, bos and turn tokens.
        too_few_sentinels: "cap" the length or "merge" spans.

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

    def __post_init__(self):
        # Two raw tokens: one stays, one goes, each beside its sentinel.
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
            warnings.warn(
                f"{self.denoiser} takes {self.raw_length} tokens at a time instead of {unlimited}, because there are "
                f"only {len(sentinels)} sentinels: its inputs take {inputs} of encoder_length={self.encoder_length} "
                f'places. Pass more ids as `sentinels`, too_few_sentinels="merge", or use shorter lengths.',
                stacklevel=3,
            )

    @cached_property
    def raw_length(self):
        """The most ids a call takes."""
        return self._raw_length(len(self.sentinels))

    @property
    def parts(self):
        """Itself, with weight 1: see `Example`."""
        return ((self, 1),)

    def __call__(self, ids, rng):
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

    def _fit_around(self, ids, protected, rng):
        """The ids and a mask whose spans avoid protected ids; ids are cut off until inputs and targets fit."""
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
    def _sentinel_ids(self):
        return np.asarray(self.sentinels, "int32")

    @cached_property
    def _is_protected(self):
        """bool, indexed by id; ids beyond its end take the last entry, which is False."""
        ids = [*self.protected, *self.sentinels, *([] if self.mode_token is None else [self.mode_token])]
        table = np.zeros(max(ids) + 2, bool)
        table[ids] = True
        return table

    def _raw_length(self, max_spans):
        places = self.encoder_length - (self.mode_token is not None)
        merge = self.too_few_sentinels == "merge"
        return self.denoiser.raw_length(places, self.decoder_length - 1, max_spans, merge=merge)


def _as_ids(name, ids):
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and (array.dtype.kind not in "iu" or array.min() < 0)):
        raise ValueError(f"`{name}` must be token ids, distinct and not negative. Received: {ids!r}.")
    return array
