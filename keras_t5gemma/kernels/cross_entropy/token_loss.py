"""What one token costs: the loss of its logits, and the loss's gradient with respect to them."""

import dataclasses
import typing

from keras import ops

from keras_t5gemma.kernels.barriers import materialized


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy of tokens, of their logits: see `VocabularyCrossEntropy`. Equal ones share a program."""

    cap: float | None
    z_loss: float
    label_smoothing: float

    def by_token(self, *targets):
        """What of a chunk's targets is an array [m, ...], a row a token: here all of them."""
        return targets

    def of_logits(self, logits, labels, shares, gradients):
        """What a chunk, or some of its tokens, add to the loss, and what the loss asks of their logits.

        Args:
            logits: capped, [m, V].
            labels: [m].
            shares: [m].
            gradients: whether they are wanted.

        Returns:
            `([loss, accuracy], gradients)`: float32 [2]; float32 [m, V], of logits before the cap, or None.
        """
        softmax = Softmax.of(logits)
        sums = _chunk_sums(self, logits, softmax, labels, shares)
        return sums, _logit_gradients(self, logits, softmax, labels, shares) if gradients else None


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The parts of a softmax over logits [m, V].

    Attributes:
        largest: of the logits, [m, 1].
        exponentials: of the logits less the largest, [m, V].
        log_sum: `log(sum(exp(logits)))`, [m, 1].
    """

    largest: typing.Any
    exponentials: typing.Any
    log_sum: typing.Any

    @classmethod
    def of(cls, logits):
        """Takes them of logits [m, V]."""
        largest = ops.max(logits, axis=-1, keepdims=True)
        # Settled, since XLA's sum of exponentials that it makes itself takes five times as long on CPUs.
        exponentials = materialized(ops.exp(logits - largest))
        return cls(largest, exponentials, largest + ops.log(ops.sum(exponentials, axis=-1, keepdims=True)))

    def times(self, factors):
        """The probabilities [m, V] times factors [m, 1]."""
        return self.exponentials * (factors * ops.exp(self.largest - self.log_sum))


def before_cap(gradient, logits, cap):
    """A gradient with respect to capped logits as one with respect to the logits before."""
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
