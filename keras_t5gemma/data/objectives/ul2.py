"""UL2 (arXiv 2205.05131): several denoisers in one objective."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property

from keras_t5gemma.data.objectives.mixture import Mixed, check_weight
from keras_t5gemma.data.objectives.span_corruption import GEMMA_CONTROL_IDS, GEMMA_SENTINELS, Denoiser, SpanCorruption
from keras_t5gemma.suggestions import check_choice

# Pairs of a denoiser and its weight. A denoiser with a mean span of None corrupts the end of the sequence.
MIXTURES: dict[str, tuple[tuple[Denoiser, int], ...]] = {
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
    # T5Gemma 2 (arXiv 2512.14856): four denoisers with weight 1, and the long suffix with weight 4.
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
    """A mixture of denoisers. One of them makes each example.

    >>> objective = UL2(encoder_length=8, decoder_length=8, mixture=[(Denoiser(None, 0.25), 1)], mode_tokens={"S": 500})
    >>> objective(np.arange(51, 59), np.random.default_rng(0))

    gives

        ids         51 52 53 54 55 56 57 58
        inputs     500 51 52 53 54 55 56  7
        targets      7 57 58

    Each denoiser has its own `raw_length`, with which its inputs fill the encoder, or its targets the decoder.
    `pretraining_dataset` deals the denoisers in their exact proportions and gives each its own number of ids. A direct
    call takes at most the shortest `raw_length`. `SpanCorruption` says more about protected ids and too few sentinels.

    Attributes:
        encoder_length: S, places for the mode token and the inputs.
        decoder_length: T, places for the targets and `<eos>`.
        mixture: "ul2", "t5gemma2" or pairs of a `Denoiser` and its weight, a whole number.
        mode_tokens: `{"R": id, "S": id, "X": id}`. The id of a denoiser's mode is the first of its inputs. `None` for
            no mode tokens.
        sentinels: distinct ids, used in order from the first; `<unused0>` .. `<unused98>` by default.
        protected: further ids that are never corrupted; by default Gemma's pad, eos, bos and turn tokens. All mode
            tokens are protected too.
        too_few_sentinels: if a denoiser needs more sentinels than there are: "cap" to limit its raw length, or "merge"
            for longer spans.

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

    def __post_init__(self) -> None:
        if isinstance(self.mixture, str):
            check_choice(self.mixture, "mixture", MIXTURES, others=", or pairs of a Denoiser and a weight")
        if unknown := set(self.mode_tokens or ()) - {"R", "S", "X"}:
            raise ValueError(f'`mode_tokens` has ids for "R", "S" and "X". Received: {sorted(unknown)} besides.')
        if not self.parts:
            raise ValueError("`mixture` is empty: it needs at least one denoiser.")

    @cached_property
    def parts(self) -> tuple[tuple[SpanCorruption, int], ...]:
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

    def _mode_token(self, denoiser: Denoiser) -> int | None:
        """The mode token of a denoiser, or None."""
        if self.mode_tokens is None:
            return None
        if denoiser.mode not in self.mode_tokens:
            raise ValueError(
                f'`mode_tokens` must have an id for "{denoiser.mode}", the mode of {denoiser}. Received: '
                f"{dict(self.mode_tokens)}."
            )
        return self.mode_tokens[denoiser.mode]
