"""PrefixLM: the encoder reads the first half of a text, the decoder continues it."""

import dataclasses

import numpy as np

from keras_t5gemma.checks import check_integer_fields
from keras_t5gemma.data.objectives.example import Example, check_ids


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """Splits a sequence in two: inputs and targets (arXiv 2504.06225: 4096 and 4096 tokens).

    >>> objective = PrefixLM(encoder_length=4, decoder_length=4)
    >>> objective(np.arange(51, 59), np.random.default_rng(0))

    gives

        ids         51 52 53 54 55 56 57 58
        inputs      51 52 53 54
        targets                 55 56 57 58

    The targets are not complete: at their end a window ends, not a text, and a model that learned `<eos>` there would
    learn to stop anywhere. `pretraining_dataset` puts `<eos>` at the end of each text, and the model learns it there.

    Attributes:
        encoder_length: S.
        decoder_length: T. Sequences shorter than S + T are split in the same proportion.
        mode_token: an id before the inputs, which takes one place of S; `None` for no such id.

    Raises:
        ValueError: if a length is not a positive integer.
    """

    encoder_length: int
    decoder_length: int
    _: dataclasses.KW_ONLY
    mode_token: int | None = None

    closes_targets = False

    def __post_init__(self) -> None:
        check_integer_fields(self, encoder_length=1 + (self.mode_token is not None), decoder_length=1)
        if self.mode_token is not None:
            check_integer_fields(self, mode_token=0)

    @property
    def raw_length(self) -> int:
        """The maximum number of ids of a call: S + T, without the mode token."""
        return self._num_places + self.decoder_length

    @property
    def parts(self) -> "tuple[tuple[PrefixLM, int], ...]":
        """The objective itself, with weight 1: see `Example`."""
        return ((self, 1),)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> Example:  # noqa: ARG002 every objective takes one
        """Splits a sequence.

        Args:
            ids: [L], 2 to `raw_length` of them.
            rng: a `numpy.random.Generator`, which is not used.

        Returns:
            An `Example` whose inputs and targets have at least one token each.

        Raises:
            ValueError: if there are fewer or more ids.
        """
        ids = check_ids(ids, self.raw_length, "PrefixLM")
        pivot = max(1, len(ids) * self._num_places // self.raw_length)
        inputs = ids[:pivot] if self.mode_token is None else np.append(np.int32(self.mode_token), ids[:pivot])
        return Example(inputs, ids[pivot:], complete=False)

    @property
    def _num_places(self) -> int:
        """Places in the encoder for ids of the sequence."""
        return self.encoder_length - (self.mode_token is not None)
