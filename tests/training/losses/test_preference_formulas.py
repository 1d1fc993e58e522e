"""Each kind of preference loss: its value and gradient, against its formula in float64 and against TRL's own code."""

import numpy as np
import pytest
from helpers import trl_losses
from helpers.gradients import gradients
from keras import ops

from keras_t5gemma.recipes import schema
from keras_t5gemma.training.losses.preference import PreferenceLoss
from keras_t5gemma.training.losses.preference_formulas import KINDS, AnswerScores, kto_divergence

BETA = 0.3
GENERATOR = np.random.default_rng(0)
COUNTS = (np.arange(6) < np.array([[6, 3], [2, 5], [4, 4], [1, 6]])[..., None]).astype("float32")
LOG_PROBS = (-1.5 * GENERATOR.random((4, 2, 6)) * COUNTS).astype("float32")
REFERENCE = (LOG_PROBS.sum(-1) + GENERATOR.normal(size=(4, 2)) - [0, 1.5]).astype("float32")
DESIRABLE = np.array([True, False, False, True])
OPTIONS = {
    "robust": {"label_smoothing": 0.2},
    "dpo": {"label_smoothing": 0.1},
    "simpo": {"gamma": 0.7, "label_smoothing": 0.1},
    "cpo": {"alpha": 0.4, "label_smoothing": 0.1},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.75},
}


def log_sigma(x):
    return -np.logaddexp(0, -x)


def sigma(x):
    return 1 / (1 + np.exp(-x))


def log_odds(x):
    return np.log(np.exp(x) / (1 - np.exp(x)))


def smoothed(d, e):
    return -(1 - e) * log_sigma(d) - e * log_sigma(-d)


def closed_form(kind, log_probs):
    """The mean loss in float64, from the papers' formulas."""
    s, n = log_probs.sum(-1), COUNTS.sum(-1)
    (sw, sl), (mw, ml), (nw, nl) = s.T, (s / n).T, n.T
    rw, rl = (s - REFERENCE).T
    d, b = BETA * (rw - rl), BETA
    losses = {
        "dpo": lambda: smoothed(d, 0.1),
        "ipo": lambda: (rw / nw - rl / nl - 1 / (2 * b)) ** 2,
        "hinge": lambda: np.maximum(0, 1 - d),
        "robust": lambda: (-0.8 * log_sigma(d) + 0.2 * log_sigma(-d)) / 0.6,
        "apo_zero": lambda: 1 - sigma(b * rw) + sigma(b * rl),
        "simpo": lambda: smoothed(b * (mw - ml) - 0.7, 0.1),
        "cpo": lambda: smoothed(b * (sw - sl), 0.1) - 0.4 * mw,
        "orpo": lambda: -mw - b * log_sigma(log_odds(mw) - log_odds(ml)),
        "kto": lambda: np.where(
            DESIRABLE, 1.5 * (1 - sigma(b * (rw - divergence()))), 0.75 * (1 - sigma(b * (divergence() - rw)))
        ),
    }
    return losses[kind]().mean()


def divergence():
    """z, of the numbers above: a constant of the gradient."""
    return max(0, (LOG_PROBS.astype("float64").sum(-1) - REFERENCE)[:, 1].mean())


def ours(kind, log_probs, **options):
    counts, reference, weights, desirable = map(
        ops.convert_to_tensor, (COUNTS, REFERENCE, np.ones(4, "float32"), DESIRABLE.astype("float32"))
    )
    scores = AnswerScores(ops.sum(log_probs, -1), ops.sum(counts, -1), reference)
    options = {**{name: value or 0.0 for name, value in KINDS[kind].options.items()}, **options}
    if kind == "kto":
        options |= {"desirable": desirable, "divergence": kto_divergence(scores.ratios[:, 1], weights)}
    return ops.mean(KINDS[kind].function(scores, BETA, **options))


def assert_same(kind, expected, options):
    value, gradient = expected
    found = gradients(lambda x: ours(kind, x, **options), LOG_PROBS)[0] * COUNTS
    loss = ops.convert_to_numpy(ours(kind, ops.convert_to_tensor(LOG_PROBS), **options))
    assert float(loss) == pytest.approx(value, rel=1e-6, abs=1e-7)
    np.testing.assert_allclose(found, gradient * COUNTS, rtol=1e-5, atol=1e-6)
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_formula(kind):
    x, step = LOG_PROBS.astype("float64"), 1e-6
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            gradient[index] += sign * closed_form(kind, moved) / (2 * step)
    assert_same(kind, (closed_form(kind, x), gradient), OPTIONS.get(kind, {}))


@pytest.mark.parametrize(
    ("kind", "theirs", "options"),
    [
        ("dpo", "sigmoid", {}),
        ("ipo", "ipo", {}),
        ("hinge", "hinge", {}),
        ("robust", "robust", OPTIONS["robust"]),
        ("apo_zero", "apo_zero", {}),
    ],
)
def test_losses_with_a_reference_are_those_of_trl(kind, theirs, options):
    value, gradient, _ = trl_losses.dpo(theirs, LOG_PROBS, COUNTS, REFERENCE, BETA, **options)
    assert_same(kind, (value, gradient), options)


def test_kto_is_that_of_trl():
    value, gradient, metrics = trl_losses.kto(LOG_PROBS, COUNTS, REFERENCE, DESIRABLE, BETA, **OPTIONS["kto"])
    assert metrics["kl"] == pytest.approx(divergence(), rel=1e-5)
    assert divergence() > 0.1
    assert_same("kto", (value, gradient), OPTIONS["kto"])


def test_simpo_and_cpo_are_those_of_trl():
    n = COUNTS.sum(-1)
    sums = LOG_PROBS.astype("float64").sum(-1)
    value, gradient = trl_losses.cpo("simpo", sums / n, BETA, 0.7, 0.1)
    assert_same("simpo", (value, (gradient / n)[..., None]), OPTIONS["simpo"])
    value, gradient = trl_losses.cpo("sigmoid", sums, BETA, label_smoothing=0.1)
    assert_same("cpo", (value, gradient[..., None]), {"alpha": 0.0, "label_smoothing": 0.1})


def test_odds_ratio_of_orpo_is_that_of_trl():
    n = COUNTS.sum(-1)
    means = LOG_PROBS.astype("float64").sum(-1) / n
    value, gradient = trl_losses.odds_ratio(means, BETA)
    gradient = (gradient / n)[..., None] - np.array([1, 0])[:, None] / n[..., None] / len(n)
    assert_same("orpo", (value - means[:, 0].mean(), gradient), {})


@pytest.mark.parametrize("mean", [-1e-9, 0.0, -60.0])
def test_orpo_is_finite_for_certain_and_for_impossible_answers(mean):
    def loss(x):
        return ops.sum(KINDS["orpo"].function(AnswerScores(x, ops.ones((1, 2))), BETA))

    x = np.array([[mean, -1.0]], "float32")
    assert np.isfinite(gradients(loss, x)[0]).all()
    assert np.isfinite(ops.convert_to_numpy(loss(ops.convert_to_tensor(x))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dpoo"}, "`kind` must be"),
        ({"beta": 0}, "`beta` must be above 0. Received: beta=0"),
        ({"gamma": 0.5}, "`gamma` is an option of simpo. Leave it out. Received: kind='dpo', gamma=0.5"),
        ({"kind": "orpo", "label_smoothing": 0.1}, "option of dpo, robust, simpo, cpo"),
        ({"kind": "kto", "alpha": 1.0}, "`alpha` is an option of cpo"),
        ({"kind": "cpo", "desirable_weight": 2.0}, "`desirable_weight` is an option of kto"),
        ({"label_smoothing": 0.5}, r"`label_smoothing` must be in \[0, 0.5\)"),
        ({"kind": "simpo", "gamma": -1}, "`gamma` must be 0 or more"),
        ({"kind": "robust"}, "kind='robust' needs `label_smoothing` above 0"),
        ({"kind": "simpo", "reference": "precomputed"}, "`reference` must be left out"),
        ({"reference": "base"}, "`reference` must be"),
        ({"reduction": "sum"}, "`reduction` must be"),
    ],
)
def test_invalid_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_config_makes_the_same_loss(kind):
    loss = PreferenceLoss(kind, BETA, **OPTIONS.get(kind, {}))
    again = PreferenceLoss.from_config(loss.get_config())
    assert (again.kind, again.beta, again.options, again.reference) == (kind, BETA, loss.options, loss.reference)


def test_recipes_know_the_same_kinds():
    assert set(schema.PREFERENCE_LOSSES) == set(KINDS)
    assert set(schema.PREFERENCES_WITH_REFERENCE) == {kind for kind, entry in KINDS.items() if entry.has_reference}
