"""Several objectives in given proportions, as one objective."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np

from keras_t5gemma.checks import is_integer
from keras_t5gemma.data.objectives.example import Example, Objective, Part, check_ids


class Mixed(abc.ABC):
    """Base class of objectives with several parts. A subclass has `parts`, see `Example`."""

    @property
    @abc.abstractmethod
    def parts(self) -> Sequence[tuple[Part, int]]:
        """Pairs of a part and its weight, a whole number."""

    @cached_property
    def raw_length(self) -> int:
        """The maximum number of ids of a call, which any part accepts."""
        return min(part.raw_length for part, _ in self.parts)

    def draw(self, rng: np.random.Generator) -> Part:
        """Draws a part by weight."""
        return self.parts[int(np.searchsorted(self._shares, rng.random(), side="right"))][0]

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> Example:
        """Draws a part by weight and calls it.

        Args:
            ids: [L], 2 to `raw_length` of them.
            rng: a `numpy.random.Generator`.

        Returns:
            An `Example`.

        Raises:
            ValueError: if there are fewer or more ids.
        """
        return self.draw(rng)(
            check_ids(ids, self.raw_length, f"{type(self).__name__}, the shortest of its parts,"), rng
        )

    @cached_property
    def _shares(self) -> np.ndarray:
        """The cumulative shares of the parts, without the last: a draw beyond all others is the last part."""
        weights = np.cumsum([weight for _, weight in self.parts])
        return weights[:-1] / weights[-1]


@dataclasses.dataclass(frozen=True)
class Mixture(Mixed):
    """Several objectives, mixed by weight. One part of one of them makes each example.

    >>> Mixture([(PrefixLM(512, 512), 1), (UL2(512, 512), 3)])

    is a quarter PrefixLM, and three quarters UL2, 3/28 for each of its seven denoisers:

        parts       (PrefixLM, 7), (R-denoiser (3, 0.15), 3), (R-denoiser (8, 0.15), 3), ...      28 in all

    A part keeps its own lengths, sentinels and mode token, and its own `raw_length`: `pretraining_dataset` deals the
    parts in their exact proportions and gives each part as many ids as it takes.

    Attributes:
        objectives: pairs of an objective (which may be a mixture) and its weight, a positive whole number.

    Raises:
        ValueError: if there is no pair, or a weight or an objective is invalid.
    """

    objectives: Sequence[tuple[Objective, int]]

    def __post_init__(self) -> None:
        for entry in self.objectives:
            if not isinstance(entry, (tuple, list)) or len(entry) != 2:
                raise ValueError(
                    f"`objectives` must be pairs of an objective and its weight, e.g. [(PrefixLM(512, 512), 1)]. "
                    f"Received: {entry!r}."
                )
        # Computes the parts now, so that errors come from the constructor and not from the first use.
        if not self.parts:
            raise ValueError("`objectives` is empty: it needs at least one pair of an objective and its weight.")

    @property
    def encoder_length(self) -> int:
        """S, the largest of the objectives'."""
        return max(objective.encoder_length for objective, _ in self.objectives)

    @property
    def decoder_length(self) -> int:
        """T, the largest of the objectives'."""
        return max(objective.decoder_length for objective, _ in self.objectives)

    @cached_property
    def parts(self) -> tuple[tuple[Part, int], ...]:
        """Pairs of a part and its weight, in the smallest whole numbers."""
        shares = []
        for objective, weight in self.objectives:
            check_weight("objectives", objective, weight)
            if not hasattr(objective, "parts"):
                raise ValueError(f"`objectives` must be pairs of an objective and a weight. Received: {objective!r}.")
            total = sum(share for _, share in objective.parts)
            shares += [(part, Fraction(int(weight) * int(share), int(total))) for part, share in objective.parts]
        scale = math.lcm(*(share.denominator for _, share in shares))
        divisor = math.gcd(*(int(share * scale) for _, share in shares))
        return tuple((part, int(share * scale) // divisor) for part, share in shares)


def check_weight(name: str, part: object, weight: object) -> None:
    """Checks the weight of a part of an objective.

    Args:
        name: the argument that holds the weight, for the message.
        part: the part, for the message.
        weight: the caller's value.

    Raises:
        ValueError: if the weight is not a positive integer.
    """
    if not is_integer(weight) or weight < 1:
        raise ValueError(
            f"Weights in `{name}` must be positive whole numbers, such as 7 and 3 for 70% and 30%. Received: "
            f"{weight!r} for {part}."
        )
