"""How much better an answer is than the other answers to its prompt."""

import numpy as np

# Added to a group's standard deviation, so that equal rewards give 0; TRL's constant.
EPSILON = 1e-4


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """The advantages of GRPO (arXiv 2402.03300): rewards in units of their group's standard deviation.

        rewards      1      0      0     1         0 0 0 0
        advantages   0.87  -0.87  -0.87  0.87      0 0 0 0

    Args:
        rewards: [B, n], the rewards of n answers per prompt, n at least 2.

    Returns:
        float64 [B, n]. The standard deviation divides by n - 1.
    """
    rewards = np.asarray(rewards, "float64")
    deviations = rewards - rewards.mean(axis=1, keepdims=True)
    return deviations / (rewards.std(axis=1, ddof=1, keepdims=True) + EPSILON)


def have_equal_rewards(rewards: np.ndarray) -> np.ndarray:
    """Whether the answers of each group have one reward, so that they teach nothing: bool [B] of rewards [B, n]."""
    return np.isclose(rewards.std(axis=1), 0)
