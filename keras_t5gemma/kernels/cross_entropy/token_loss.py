"""The loss of one token's logits, and its gradient with respect to them."""

import dataclasses
import typing

from keras import ops

from keras_t5gemma.kernels.barriers import materialized


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy of tokens, computed from their logits; see `VocabularyCrossEntropy`.

    Equal instances share a compiled program.

    Attributes:
        cap: soft cap on the logits, or None.
        z_loss: weight of the squared log-sum-exp.
        label_smoothing: share of the probability that is spread over the vocabulary.
    """

    cap: float | None
    z_loss: float
    label_smoothing: float

    def by_token(self, *targets):
        """The targets that have one row per token, [m, ...]. Here: all."""
        return targets

    def of_logits(self, logits, labels, shares, gradients: bool):
        """The weighted loss and accuracy of a chunk's tokens, and the gradients of their logits.

        Args:
            logits: capped logits, float32 [m, V].
            labels: int [m].
            shares: float32 [m], each token's weight in the mean.
            gradients: whether to compute gradients.

        Returns:
            `([loss, accuracy], gradients)`: float32 [2], and float32 [m, V] with respect to the logits before the cap,
            or None.
        """
        softmax = Softmax.of(logits)
        sums = _chunk_sums(self, logits, softmax, labels, shares)
        return sums, _logit_gradients(self, logits, softmax, labels, shares) if gradients else None


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The parts of a softmax over logits [m, V].

    Attributes:
        largest: the largest logit, [m, 1].
        exponentials: `exp(logits - largest)`, [m, V].
        log_sum: `log(sum(exp(logits)))`, [m, 1].
    """

    largest: typing.Any
    exponentials: typing.Any
    log_sum: typing.Any

    @classmethod
    def of(cls, logits) -> "Softmax":
        """Computes the parts for logits [m, V]."""
        largest = ops.max(logits, axis=-1, keepdims=True)
        # A barrier: if XLA fuses the exponentials into their sum, the sum takes five times as long on CPUs.
        exponentials = materialized(ops.exp(logits - largest))
        return cls(largest, exponentials, largest + ops.log(ops.sum(exponentials, axis=-1, keepdims=True)))

    def times(self, factors):
        """The probabilities [m, V], multiplied by factors [m, 1]."""
        return self.exponentials * (factors * ops.exp(self.largest - self.log_sum))


def before_cap(gradient, logits, cap: float | None):
    """Converts a gradient with respect to capped logits into one with respect to the logits before the cap.

    Args:
        gradient: [m, V].
        logits: the capped logits [m, V].
        cap: the soft cap, or None.

    Returns:
        [m, V].
    """
    return gradient if cap is None else gradient * (1 - ops.square(logits / cap))


def _chunk_sums(loss, logits, softmax, labels, shares):
    """[loss, accuracy] of a chunk, weighted by its tokens' shares [m]."""
    log_sum = softmax.log_sum
    picked = ops.take_along_axis(logits, ops.expand_dims(labels, -1), axis=-1)
    losses = log_sum - (1 - loss.label_smoothing) * picked
    if loss.label_smoothing:
        losses = losses - loss.label_smoothing * ops.mean(logits, axis=-1, keepdims=True)
    if loss.z_loss:
        losses = losses + loss.z_loss * ops.square(log_sum)
    correct = ops.cast(picked >= softmax.largest, "float32")
    return ops.sum(ops.expand_dims(shares, -1) * ops.concatenate([losses, correct], axis=-1), axis=0)


def _logit_gradients(loss, logits, softmax, labels, shares):
    """The loss's gradient with respect to a chunk's logits before the cap, [m, V]."""
    shares, labels = ops.expand_dims(shares, -1), ops.expand_dims(labels, -1)
    gradient = softmax.times(shares * (1 + 2 * loss.z_loss * softmax.log_sum))
    if loss.label_smoothing:
        gradient = gradient - shares * (loss.label_smoothing / logits.shape[-1])
    is_label = ops.equal(ops.arange(logits.shape[-1], dtype="int32"), labels)
    gradient = ops.where(is_label, gradient - shares * (1 - loss.label_smoothing), gradient)
    return before_cap(gradient, logits, loss.cap)
