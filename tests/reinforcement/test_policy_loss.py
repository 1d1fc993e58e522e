"""The loss of a policy, its gradient and the advantages against float64 mathematics, PyTorch's autograd and TRL."""

import collections
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from helpers.gradients import gradients
from keras import ops

from keras_t5gemma.reinforcement.advantages import EPSILON, group_advantages, have_equal_rewards
from keras_t5gemma.reinforcement.policy_loss import PolicyLoss

R, T = 6, 5
EPSILONS = 0.2, 0.3
CASES = [(loss, beta) for loss in ("grpo", "dapo") for beta in (0.0, 0.04)]


@pytest.fixture(scope="module")
def arrays():
    """Log-probabilities now, then and by the reference [R, T], advantages [R], weights [R, T]."""
    generator = np.random.default_rng(0)
    now, old, reference = (generator.uniform(-3, -0.1, (R, T)).astype("float32") for _ in range(3))
    old = (now + generator.uniform(-0.6, 0.6, (R, T))).astype("float32")  # ratios from 0.55 to 1.8: both clips act
    weights = (np.arange(T) < np.array([5, 4, 3, 1, 0, 2])[:, None]).astype("float32")  # one answer is left out
    # What stands at padding is arbitrary: such as the log-probability of a token that was not drawn.
    now[weights == 0], old[weights == 0] = -2000, 100
    return now, old, reference, np.array([1.5, -0.7, 0.3, -1.1, 0.9, -0.4], "float32"), weights


def closed_form(arrays, loss, beta):
    """`(loss, gradient by `now` [R, T], clipped [R, T])` in float64, token by token."""
    now, old, reference, advantages, weights = (x.astype("float64") for x in arrays)
    total, gradient, clipped = 0.0, np.zeros((R, T)), np.zeros((R, T), bool)
    for row, token in np.argwhere(weights):
        advantage, ratio = advantages[row], np.exp(now[row, token] - old[row, token])
        too_far = ratio > 1 + EPSILONS[1] if advantage > 0 else ratio < 1 - EPSILONS[0]
        bound = 1 + EPSILONS[1] if advantage > 0 else 1 - EPSILONS[0]
        value, slope = (-bound * advantage, 0.0) if too_far else (-ratio * advantage, -ratio * advantage)
        difference = reference[row, token] - now[row, token]
        value += beta * (np.exp(difference) - difference - 1)
        slope += beta * (1 - np.exp(difference))
        share = 1 / weights.sum() if loss == "dapo" else 1 / weights[row].sum() / R
        total, gradient[row, token], clipped[row, token] = total + share * value, share * slope, too_far
    return total, gradient, clipped


def loss_of(arrays, loss, beta):
    """A function of `now` that gives `(loss, measures)`."""
    _, old, reference, advantages, weights = map(ops.convert_to_tensor, arrays)
    policy_loss = PolicyLoss(loss, beta, *EPSILONS)
    return lambda now: policy_loss(now, old, advantages, weights, reference if beta else None)


@pytest.mark.parametrize(("loss", "beta"), CASES)
def test_loss_and_gradient_are_by_definition_with_both_clips(arrays, loss, beta):
    expected, gradient, clipped = closed_form(arrays, loss, beta)
    positive = arrays[3][:, None] > 0
    assert (clipped & positive).any()
    assert (clipped & ~positive).any()
    value, measures = loss_of(arrays, loss, beta)(ops.convert_to_tensor(arrays[0]))
    np.testing.assert_allclose(float(value), expected, rtol=1e-6, atol=1e-6)
    assert float(measures["tokens"]) == arrays[4].sum()
    assert float(measures["high"]) == (clipped & positive).sum()
    assert float(measures["low"]) == (clipped & ~positive).sum()
    (found,) = gradients(lambda now: loss_of(arrays, loss, beta)(now)[0], arrays[0])
    np.testing.assert_allclose(found, gradient, rtol=1e-6, atol=1e-6)
    assert ("kl" in measures) == bool(beta)


@pytest.mark.skipif(keras.config.backend() != "torch", reason="TRL takes 20 s to import, and the numbers are the same")
@pytest.mark.parametrize(("loss", "beta"), CASES)
def test_loss_and_gradient_are_those_of_trl(arrays, loss, beta):
    torch = pytest.importorskip("torch")
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    now, old, reference, advantages, weights = map(torch.tensor, arrays)
    # Where TRL looks at padding at all, it would find infinities here.
    now, old = (torch.where(weights > 0, x, torch.zeros(())) for x in (now, old))
    now.requires_grad_()
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    peer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, torch.zeros(R, T), None),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics={"train": collections.defaultdict(list)},
        loss_type=loss,
        beta=beta,
        epsilon_low=EPSILONS[0],
        epsilon_high=EPSILONS[1],
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
    )
    zeros = torch.zeros(R, 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": zeros,
        "prompt_mask": zeros,
        "completion_ids": torch.zeros(R, T, dtype=torch.int64),
        "completion_mask": weights,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": weights.sum(),
    }
    expected = trainer._compute_loss(peer, None, inputs)
    expected.backward()
    value, measures = loss_of(arrays, loss, beta)(ops.convert_to_tensor(arrays[0]))
    np.testing.assert_allclose(float(value), expected.item(), rtol=1e-5)
    (found,) = gradients(lambda now: loss_of(arrays, loss, beta)(now)[0], arrays[0])
    np.testing.assert_allclose(found, now.grad.numpy(), rtol=1e-5, atol=1e-6)
    for name, theirs in {"kl": "kl", "low": "clip_ratio/low_mean", "high": "clip_ratio/high_mean"}.items():
        if name in measures:
            mean = float(measures[name]) / float(measures["tokens"])
            np.testing.assert_allclose(mean, peer._metrics["train"][theirs][0], rtol=1e-5)


def test_batch_without_a_token_has_loss_and_gradient_zero(arrays):
    nothing = (*arrays[:4], np.zeros((R, T), "float32"))
    for loss, beta in CASES:
        value = loss_of(nothing, loss, beta)
        (gradient,) = gradients(lambda now, value=value: value(now)[0], arrays[0])
        assert float(value(ops.convert_to_tensor(arrays[0]))[0]) == 0
        assert not gradient.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ppo", 0.0, 0.2, None), "`loss`"),
        (("grpo", -0.1, 0.2, None), "`beta`"),
        (("grpo", 0.0, 1.0, None), "`epsilon`"),
        (("grpo", 0.0, 0.2, 0.0), "`epsilon_high`"),
    ],
)
def test_invalid_option_is_an_error_that_names_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(*arguments)


def test_advantages_are_deviations_in_units_of_the_standard_deviation_of_a_group():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.1, 0.5, -3.0, 10.0]])
    advantages = group_advantages(rewards)
    for group, found in zip(rewards, advantages, strict=True):
        mean = sum(group) / 4
        deviation = (sum((value - mean) ** 2 for value in group) / 3) ** 0.5
        np.testing.assert_allclose(found, [(value - mean) / (deviation + EPSILON) for value in group], rtol=1e-12)
    np.testing.assert_allclose(advantages[0], [0.87, -0.87, -0.87, 0.87], atol=5e-3)  # as in the docstring
    assert have_equal_rewards(rewards).tolist() == [False, True, False]
