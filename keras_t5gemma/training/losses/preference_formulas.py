"""The formulas of `PreferenceLoss`, one function per kind: from log-probabilities of answers to a loss per prompt.

Symbols: s is the sum of the log-probabilities of an answer's tokens, its end included, n their number, m = s / n; r is
s minus the same sum of the reference; w is the chosen answer, l the rejected one; sigma is the logistic function.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from keras import ops


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """The log-probabilities of two answers per prompt, float32 [B, 2]: of chosen and rejected, in this order.

    Attributes:
        sums: s.
        lengths: n, at least 1.
        reference: the reference's s, or None.
    """

    sums: Any
    lengths: Any
    reference: Any = None

    @property
    def means(self):
        """m, [B, 2]."""
        return self.sums / self.lengths

    @property
    def ratios(self):
        """r, [B, 2]; s if there is no reference."""
        return self.sums if self.reference is None else self.sums - self.reference


def dpo(scores: AnswerScores, beta: float, label_smoothing: float):
    """-log sigma(beta (r_w - r_l)) (arXiv 2305.18290); smoothed as conservative DPO, with label_smoothing e.

    The smoothed loss is -(1 - e) log sigma(d) - e log sigma(-d), d = beta (r_w - r_l).
    """
    return _smoothed(beta * _difference(scores.ratios), label_smoothing)


def robust(scores: AnswerScores, beta: float, label_smoothing: float):
    """(-(1 - e) log sigma(d) + e log sigma(-d)) / (1 - 2 e), unbiased if a share e of labels is flipped.

    From arXiv 2403.00409; d = beta (r_w - r_l).
    """
    d, e = beta * _difference(scores.ratios), label_smoothing
    return (e * ops.log_sigmoid(-d) - (1 - e) * ops.log_sigmoid(d)) / (1 - 2 * e)


def ipo(scores: AnswerScores, beta: float):
    """(r_w / n_w - r_l / n_l - 1 / (2 beta))^2 (arXiv 2310.12036), per token as in TRL, whose authors confirmed it."""
    return ops.square(_difference(scores.ratios / scores.lengths) - 1 / (2 * beta))


def hinge(scores: AnswerScores, beta: float):
    """max(0, 1 - beta (r_w - r_l)) (SLiC, arXiv 2305.10425, with a reference as in arXiv 2309.06657)."""
    return ops.relu(1 - beta * _difference(scores.ratios))


def apo_zero(scores: AnswerScores, beta: float):
    """1 - sigma(beta r_w) + sigma(beta r_l) (arXiv 2408.06266, equation 7)."""
    chosen, rejected = _columns(beta * scores.ratios)
    return ops.sigmoid(-chosen) + ops.sigmoid(rejected)


def simpo(scores: AnswerScores, beta: float, gamma: float, label_smoothing: float):
    """-log sigma(beta (m_w - m_l) - gamma) (arXiv 2405.14734), smoothed as DPO."""
    return _smoothed(beta * _difference(scores.means) - gamma, label_smoothing)


def cpo(scores: AnswerScores, beta: float, alpha: float, label_smoothing: float):
    """-log sigma(beta (s_w - s_l)) - alpha m_w (arXiv 2401.08417), the first part smoothed as DPO."""
    return _smoothed(beta * _difference(scores.sums), label_smoothing) - alpha * _columns(scores.means)[0]


def orpo(scores: AnswerScores, beta: float):
    """-m_w - beta log sigma(m_w - m_l - (log(1 - e^m_w) - log(1 - e^m_l))) (arXiv 2403.07691), of means, as in TRL."""
    odds = _difference(scores.means) - _difference(_log1mexp(scores.means))
    return -_columns(scores.means)[0] - beta * ops.log_sigmoid(odds)


def kto(scores: AnswerScores, beta: float, desirable, divergence, desirable_weight: float, undesirable_weight: float):
    """1 - sigma(beta (r - z)) of a desirable answer, 1 - sigma(beta (z - r)) of another (arXiv 2402.01306, equation 8).

    Args:
        scores: of the answers alone in column 0.
        beta: how much the model may differ from the reference.
        desirable: float32 [B], 1 or 0.
        divergence: z, the result of `kto_divergence`.
        desirable_weight: the weight of desirable answers.
        undesirable_weight: that of the others.

    Returns:
        [B].
    """
    distance = beta * (scores.ratios[:, 0] - divergence)
    wanted = desirable_weight * ops.sigmoid(-distance)
    return desirable * wanted + (1 - desirable) * undesirable_weight * ops.sigmoid(distance)


def kto_divergence(ratios, weights):
    """z, the mean r of answers to other prompts, at least 0: an estimate of the divergence from the reference.

    Args:
        ratios: r of the mismatched answers, [B].
        weights: [B].

    Returns:
        A scalar, through which no gradient flows.
    """
    mean = ops.divide_no_nan(ops.sum(weights * ratios), ops.sum(weights))
    return ops.stop_gradient(ops.maximum(mean, 0.0))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of `PreferenceLoss`.

    Attributes:
        function: its formula.
        options: its arguments besides beta and their defaults; None for one without default.
        has_reference: whether the formula reads the reference.
        reward: the rewards [B, 2] of `AnswerScores`, divided by beta: r, s or m.
        is_paired: whether rows have a chosen and a rejected answer.
    """

    function: Callable
    options: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    has_reference: bool = True
    reward: str = "ratios"
    is_paired: bool = True


# Defaults as in TRL 1.16: DPOConfig, CPOConfig, KTOConfig.
KINDS = {
    "dpo": Kind(dpo, {"label_smoothing": 0.0}),
    "ipo": Kind(ipo),
    "hinge": Kind(hinge),
    "robust": Kind(robust, {"label_smoothing": None}),
    "apo_zero": Kind(apo_zero),
    "simpo": Kind(simpo, {"gamma": 0.5, "label_smoothing": 0.0}, has_reference=False, reward="means"),
    "cpo": Kind(cpo, {"alpha": 1.0, "label_smoothing": 0.0}, has_reference=False),
    "orpo": Kind(orpo, has_reference=False, reward="means"),
    "kto": Kind(kto, {"desirable_weight": 1.0, "undesirable_weight": 1.0}, is_paired=False),
}


def _columns(x):
    """Chosen and rejected, [B] each, of [B, 2]."""
    return x[:, 0], x[:, 1]


def _difference(x):
    """Chosen minus rejected, [B], of [B, 2]."""
    return x[:, 0] - x[:, 1]


def _smoothed(d, e: float):
    """-(1 - e) log sigma(d) - e log sigma(-d); without the second part at e = 0."""
    loss = -(1 - e) * ops.log_sigmoid(d)
    return loss - e * ops.log_sigmoid(-d) if e else loss


def _log1mexp(x):
    """log(1 - e^x) for x < 0 without cancellation, by two forms that meet at -log 2.

    Each form gets arguments of its own side, so that its gradient is finite where it is not used.
    """
    middle = -math.log(2)
    # The largest float32 below 0 that 1 - e^x does not round to 0: a probability of 1 has no odds.
    x = ops.minimum(x, -1e-7)
    far, near = ops.minimum(x, middle), ops.maximum(x, middle)
    return ops.where(x < middle, ops.log1p(-ops.exp(far)), ops.log(-ops.expm1(near)))
