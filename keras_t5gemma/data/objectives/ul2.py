"""UL2 (arXiv 2205.05131): several denoisers in one objective."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property

from keras_t5gemma.data.objectives.mixture import Mixed, check_weight
from keras_t5gemma.data.objectives.span_corruption import GEMMA_CONTROL_IDS, GEMMA_SENTINELS, Denoiser, SpanCorruption
from keras_t5gemma.suggestions import check_choice

# (denoiser, weight); a mean span of None is the one that ends the sequence.
MIXTURES = {
    # UL2: two R-, four X- and one S-denoiser in equal parts.
    "ul2": (
        (Denoiser(3, 0.15), 1),
        (Denoiser(8, 0.15), 1),
        (Denoiser(3, 0.5), 1),
        (Denoiser(8, 0.5), 1),
        (Denoiser(64, 0.15), 1),
        (Denoiser(64, 0.5), 1),
        (Denoiser(None, 0.25), 1),
    ),
    # T5Gemma 2 (arXiv 2512.14856): four at 1 each, the long suffix at 4.
    "t5gemma2": (
        (Denoiser(3, 0.15), 1),
        (Denoiser(12, 0.5), 1),
        (Denoiser(32, 0.15), 1),
        (Denoiser(32, 0.5), 1),
        (Denoiser(None, 0.75), 4),
    ),
}


@dataclasses.dataclass(frozen=True)
class UL2(Mixed):
    """A mixture of denoisers; each example is made by one of them.

    >>> objective = UL2(encoder_length=8, decoder_length=8, mixture=[(Denoiser(None, 0.25), 1)], mode_tokens={"S": 500})
    >>> objective(np.arange(51, 59), np.random.default_rng(0))

    gives

        ids         51 52 53 54 55 56 57 58
        inputs     500 51 52 53 54 55 56  7
        targets      7 57 58

    Each denoiser has its own `raw_length`, with which its inputs fill the encoder, or its targets the decoder.
    `pretraining_dataset` deals the denoisers in their exact proportions and gives each its own; what a call takes is
    the shortest of them. About protected ids and running out of sentinels, see `SpanCorruption`.

    Attributes:
        encoder_length: S, places for the mode token and the inputs.
        decoder_length: T, places for the targets and `<eos>`.
        mixture: "ul2", "t5gemma2" or pairs of a `Denoiser` and its weight, a whole number.
        mode_tokens: `{"R": id, "S": id, "X": id}`, of which each denoiser's stands first in its inputs; `None` for
            none.
        sentinels: distinct ids, used in their order from the first; `<unused0>` .. `<unused98>` by default.
        protected: further ids that are never corrupted; by default Gemma's pad, eos, bos and turn tokens. All mode
            tokens are protected besides.
        too_few_sentinels: "cap" the length of a denoiser that runs out, or "merge" its spans.

    Raises:
        ValueError: if a value is out of range or unknown.
    """

    encoder_length: int
    decoder_length: int
    _: dataclasses.KW_ONLY
    mixture: str | Sequence[tuple[Denoiser, int]] = "ul2"
    mode_tokens: Mapping[str, int] | None = None
    sentinels: Sequence[int] = GEMMA_SENTINELS
    protected: Sequence[int] = GEMMA_CONTROL_IDS
    too_few_sentinels: str = "cap"

    def __post_init__(self):
        if isinstance(self.mixture, str):
            check_choice(self.mixture, "mixture", MIXTURES, others=", or pairs of a Denoiser and a weight")
        if unknown := set(self.mode_tokens or ()) - {"R", "S", "X"}:
            raise ValueError(f'`mode_tokens` has ids for "R", "S" and "X". Received: {sorted(unknown)} besides.')
        if not self.parts:
            raise ValueError("`mixture` is empty: it needs at least one denoiser.")

    @cached_property
    def parts(self):
        """Pairs of a `SpanCorruption` and its weight."""
        mixture = MIXTURES[self.mixture] if isinstance(self.mixture, str) else self.mixture
        parts = []
        for denoiser, weight in mixture:
            check_weight("mixture", denoiser, weight)
            part = SpanCorruption(
                denoiser,
                self.encoder_length,
                self.decoder_length,
                sentinels=self.sentinels,
                mode_token=self._mode_token(denoiser),
                protected=(*self.protected, *(self.mode_tokens or {}).values()),
                too_few_sentinels=self.too_few_sentinels,
            )
            parts.append((part, weight))
        return tuple(parts)

    def _mode_token(self, denoiser):
        """The mode token of a denoiser, or None."""
        if self.mode_tokens is None:
            return None
        if denoiser.mode not in self.mode_tokens:
            raise ValueError(
                f'`mode_tokens` must have an id for "{denoiser.mode}", the mode of {denoiser}. Received: '
                f"{dict(self.mode_tokens)}."
            )
        return self.mode_tokens[denoiser.mode]
