"""Several objectives in given proportions, as one objective."""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np

from keras_t5gemma.checks import is_integer
from keras_t5gemma.data.objectives.example import check_ids


class Mixed:
    """What objectives of several parts share; a subclass has `parts`, see `Example`."""

    @cached_property
    def raw_length(self):
        """The most ids a call takes, whichever part is drawn."""
        return min(part.raw_length for part, _ in self.parts)

    def draw(self, rng):
        """A part, by weight."""
        return self.parts[np.searchsorted(self._shares, rng.random(), side="right")][0]

    def __call__(self, ids, rng):
        """Draws a part by weight and calls it.

        Args:
            ids: [L], 2 to `raw_length` of them.
            rng: a `numpy.random.Generator`.

        Returns:
            An `Example`.

        Raises:
            ValueError: where there are fewer or more ids.
        """
        return self.draw(rng)(
            check_ids(ids, self.raw_length, f"{type(self).__name__}, the shortest of its parts,"), rng
        )

    @cached_property
    def _shares(self):
        weights = np.cumsum([weight for _, weight in self.parts])
        # The last is left off: a draw beyond all others is the last part.
        return weights[:-1] / weights[-1]


@dataclasses.dataclass(frozen=True)
class Mixture(Mixed):
    """Objectives mixed by weight; each example is made by one part of one of them.

    >>> Mixture([(PrefixLM(512, 512), 1), (UL2(512, 512), 3)])

    is a quarter PrefixLM, and three quarters UL2, 3/28 for each of its seven denoisers:

        parts       (PrefixLM, 7), (R-denoiser (3, 0.15), 3), (R-denoiser (8, 0.15), 3), ...      28 in all

    A part keeps its own lengths, sentinels and mode token, and its own `raw_length`: `pretraining_dataset` deals the
    parts in their exact proportions and gives each as many ids as it takes.

    Attributes:
        objectives: pairs of an objective (a mixture too) and its weight, a positive whole number.

    Raises:
        ValueError: where there is no pair, or a weight or an objective is none.
    """

    objectives: Sequence[tuple]

    def __post_init__(self):
        # Not only where they are first needed: what is wrong is told here.
        if not self.parts:
            raise ValueError("`objectives` is empty: it needs at least one pair of an objective and its weight.")

    @property
    def encoder_length(self):
        """S, the longest of the parts'."""
        return max(objective.encoder_length for objective, _ in self.objectives)

    @property
    def decoder_length(self):
        """T, the longest of the parts'."""
        return max(objective.decoder_length for objective, _ in self.objectives)

    @cached_property
    def parts(self):
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


def check_weight(name, part, weight):
    """Checks a weight.

    Raises:
        ValueError: where it is no positive whole number; the message names the argument and the part.
    """
    if not is_integer(weight) or weight < 1:
        raise ValueError(
            f"Weights in `{name}` must be positive whole numbers, such as 7 and 3 for 70% and 30%. Received: "
            f"{weight!r} for {part}."
        )
