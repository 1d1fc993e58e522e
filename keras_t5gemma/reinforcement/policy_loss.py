"""The loss of a policy: clipped ratios of probabilities, and the distance to a reference.

With r the ratio of a token's probability now to that when it was drawn, A the advantage of its answer, and d the
reference's log-probability minus the present one, a token's loss is

    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta (exp(d) - d - 1)

The minimum stops the gradient of a token whose ratio has already moved far enough in the direction of its advantage.
The second term estimates the Kullback-Leibler divergence from the reference, token by token; it is never negative.
"""

from keras import ops

from keras_t5gemma.checks import is_number
from keras_t5gemma.suggestions import check_choice

# How the losses of tokens become one number: `Accumulation` reads this to add up the parts of a batch.
REDUCTIONS = {"grpo": "sum_over_batch_size", "dapo": "mean_with_sample_weight"}


class PolicyLoss:
    """The loss of GRPO (arXiv 2402.03300) or DAPO (arXiv 2503.14476).

    Args:
        loss: "grpo" for the mean over answers of their means over tokens, "dapo" for the mean over all tokens, so that
            a token counts the same in long and in short answers.
        beta: weight of the distance to the reference; 0 for no reference.
        epsilon: how far below 1 a ratio is followed.
        epsilon_high: how far above 1; as `epsilon` if None.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, loss: str, beta: float, epsilon: float, epsilon_high: float | None):
        check_choice(loss, "loss", REDUCTIONS)
        if not (is_number(beta) and beta >= 0):
            raise ValueError(f"`beta` must be 0, for no reference, or positive. Received: beta={beta!r}.")
        if not (is_number(epsilon) and 0 < epsilon < 1):
            raise ValueError(f"`epsilon` must be in (0, 1). Received: epsilon={epsilon!r}.")
        if epsilon_high is not None and not (is_number(epsilon_high) and epsilon_high > 0):
            raise ValueError(f"`epsilon_high` must be positive, or None for epsilon. Received: {epsilon_high!r}.")
        self.beta, self.epsilon = beta, epsilon
        self.epsilon_high = epsilon if epsilon_high is None else epsilon_high
        self.reduction = REDUCTIONS[loss]

    def __call__(self, log_probs, old_log_probs, advantages, weights, reference_log_probs=None):
        """The loss of R answers of T positions.

        Args:
            log_probs: float32 [R, T], in nats, by the present weights.
            old_log_probs: [R, T], by the weights that drew the tokens.
            advantages: [R].
            weights: float32 [R, T], 1 at the tokens of answers and 0 elsewhere.
            reference_log_probs: [R, T], by the reference; required if `beta` is not 0, and ignored otherwise.

        Returns:
            `(loss, measures)`: a float32 scalar; and a dict of float32 scalars without gradients: `tokens`, the sum of
            the weights, and sums over tokens: `low` and `high`, of tokens whose gradient the lower and the upper clip
            stops, and `kl` if there is a reference.
        """
        # At padding any number may stand, whose exponential could be infinite, and 0 times that NaN.
        log_probs = ops.where(weights > 0, log_probs, ops.cast(old_log_probs, log_probs.dtype))
        advantages = ops.expand_dims(advantages, 1)
        ratio = ops.exp(log_probs - old_log_probs)
        clipped = ops.clip(ratio, 1 - self.epsilon, 1 + self.epsilon_high)
        losses = -ops.minimum(ratio * advantages, clipped * advantages)
        is_low = ops.logical_and(ratio < 1 - self.epsilon, advantages < 0)
        is_high = ops.logical_and(ratio > 1 + self.epsilon_high, advantages > 0)
        by_token = {"low": ops.cast(is_low, "float32"), "high": ops.cast(is_high, "float32")}
        if self.beta:
            difference = ops.where(weights > 0, reference_log_probs - log_probs, 0.0)
            by_token["kl"] = ops.exp(difference) - difference - 1
            losses = losses + self.beta * by_token["kl"]
        losses = losses * weights
        if self.reduction == REDUCTIONS["dapo"]:
            loss = ops.sum(losses) / ops.maximum(ops.sum(weights), 1.0)
        else:
            loss = ops.mean(ops.sum(losses, axis=1) / ops.maximum(ops.sum(weights, axis=1), 1.0))
        measures = {name: ops.stop_gradient(ops.sum(x * weights)) for name, x in by_token.items()}
        return loss, {"tokens": ops.sum(weights), **measures}
