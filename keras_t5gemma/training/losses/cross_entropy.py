"""Cross-entropy over a large vocabulary without its logits: [B, T, 256000] of float32 never exists.

Chunks of tokens go through the output projection, the soft cap and the softmax one by one. The same pass computes the
gradients with respect to hidden states and table, so that nothing is computed twice: three products of tokens x
vocabulary x width, as many as the plain loss takes.
"""

from collections.abc import Mapping

import keras
from keras import ops

from keras_t5gemma.kernels import cross_entropy
from keras_t5gemma.kernels.choose import implementation
from keras_t5gemma.kernels.cross_entropy import reference
from keras_t5gemma.kernels.cross_entropy.chunks import TokenChunks, default_chunk_bytes
from keras_t5gemma.kernels.cross_entropy.token_loss import CrossEntropy
from keras_t5gemma.kernels.device import devices_of_a_batch, replicas
from keras_t5gemma.training.losses.labels import IGNORED_LABEL, labels_and_weights


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class VocabularyCrossEntropy(keras.losses.Loss):
    """Mean cross-entropy of target tokens, in nats, in float32, each weighted by its sample weight.

    A label of -100 has weight 0, as in PyTorch and Hugging Face, and a label of weight 0 may be any number.

    Called on logits it is a plain Keras loss. A `T5GemmaSeq2SeqLM` that is compiled with it, which is the default,
    never computes all logits: it calls `from_hidden_states`, which returns the same value and gradients.

    Args:
        z_loss: weight of `log(sum(exp(logits))) ** 2`, which keeps logits from drifting; 1e-4 in PaLM (arXiv
            2204.02311).
        label_smoothing: the part of the target that is spread evenly over the vocabulary.
        name: the loss's name.
        **kwargs: further arguments of `keras.losses.Loss`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        name: str = "vocabulary_cross_entropy",
        **kwargs,
    ):
        # A mean over target tokens: Keras's usual reduction divides by padding too.
        super().__init__(**{"reduction": "mean_with_sample_weight", **kwargs}, name=name)
        if not z_loss >= 0:
            raise ValueError(f"`z_loss` must be 0 or more. Received: z_loss={z_loss!r}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be in [0, 1). Received: label_smoothing={label_smoothing!r}.")
        self.z_loss = z_loss
        self.label_smoothing = label_smoothing

    def __call__(self, y_true, y_pred, sample_weight=None):
        """The reduced loss of labels [B, T] and logits [B, T, V], with weights [B, T] or [B]."""
        labels, weights = labels_and_weights(ops.convert_to_tensor(y_true), sample_weight, y_pred.shape[:-1])
        return super().__call__(labels, y_pred, weights)

    def call(self, y_true, y_pred):
        """Losses [B, T] of labels [B, T] and logits [B, T, V] after the cap; 0 at labels of -100."""
        logits = ops.cast(y_pred, "float32")
        log_sum = ops.logsumexp(logits, axis=-1)
        ignored = ops.cast(y_true, "int32") == IGNORED_LABEL
        labels = ops.expand_dims(ops.where(ignored, 0, ops.cast(y_true, "int32")), -1)
        picked = ops.squeeze(ops.take_along_axis(logits, labels, axis=-1), -1)
        losses = log_sum - (1 - self.label_smoothing) * picked
        if self.label_smoothing:
            losses = losses - self.label_smoothing * ops.mean(logits, axis=-1)
        if self.z_loss:
            losses = losses + self.z_loss * ops.square(log_sum)
        return ops.where(ignored, 0.0, losses)

    def from_hidden_states(
        self,
        hidden,
        table,
        labels,
        weights=None,
        *,
        cap: float | None = None,
        training: bool = True,
        train_table: bool = True,
        chunk_bytes: int | None = None,
    ):
        """The mean loss and the accuracy, without the logits.

        Args:
            hidden: [B, T, D], the input of the projection, in the compute dtype.
            table: [V, D], the projection; its gradient has its dtype.
            labels: int [B, T]; -100 has weight 0, and a label of weight 0 may be any number.
            weights: [B, T], 0 at padding; or [B], one per row; equal if None.
            cap: soft cap on the logits, or None.
            training: whether gradients are needed.
            train_table: whether the table's gradient is needed; without it a third of the work is saved.
            chunk_bytes: bytes of float32 logits per chunk and device; `default_chunk_bytes` if None. It changes time
                and memory, not the result.

        Returns:
            `(loss, accuracy, total weight)`, float32 scalars. The accuracy is the weighted share of tokens whose label
            has the largest logit. No gradient flows through the latter two.
        """
        y, (labels, weights) = labels, labels_and_weights(self.labels_of(labels), weights, hidden.shape[:-1])
        total = ops.sum(weights)
        # As in Keras's reduction, a batch that is all padding has loss zero.
        shares = ops.divide_no_nan(weights, total)
        size = (chunk_bytes or default_chunk_bytes(hidden)) * devices_of_a_batch()[1]
        chunks = TokenChunks(hidden.shape, table.shape[0], size)
        scale = float16_scale(hidden, shares) if training and is_float16(hidden) else 1.0
        token_loss, by_token, shared = self.token_loss(cap, y, labels, shares * scale)
        targets = tuple(chunks.cut(array) for array in by_token), shared
        if training:
            sums = _with_gradients(chunks, token_loss, targets, hidden, table, train_table) / scale
        else:
            sums = reference.sums(token_loss, targets, chunks.count, chunks.cut(hidden), table)
        return sums[0], ops.stop_gradient(sums[1]), total

    def labels_of(self, y, vocabulary_size: int | None = None):  # noqa: ARG002 for losses whose y holds more
        """The labels [B, T] of a batch's y, which is checked; against the vocabulary too, if its size is passed."""
        if isinstance(y, Mapping):
            raise ValueError(
                f"`{type(self).__name__}` takes labels [B, T]. Received: a dict of {', '.join(y)}. For batches of "
                f"`distillation_dataset` or of a `StoredTeacher`, compile with `loss=kt.Distillation(teacher)`."
            )
        return y

    def token_loss(self, cap: float | None, y, labels, shares):  # noqa: ARG002 for losses whose y holds more
        """The loss per token, and the arrays that it reads.

        Args:
            cap: soft cap on the logits, or None.
            y: the batch's y.
            labels: its labels, int32 [B, T], all of them in the vocabulary.
            shares: [B, T], the share of each token in the mean.

        Returns:
            `(token_loss, by_token, shared)`: a `CrossEntropy`; arrays [B, T, ...], which are cut into chunks of tokens;
            and arrays that every chunk reads whole.
        """
        return CrossEntropy(cap, self.z_loss, self.label_smoothing), (labels, shares), ()

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {**super().get_config(), "z_loss": self.z_loss, "label_smoothing": self.label_smoothing}


def is_float16(x) -> bool:
    """Whether a tensor is float16, in which gradients of a large vocabulary vanish unless they are scaled."""
    return keras.backend.standardize_dtype(x.dtype) == "float16"


def float16_scale(hidden, shares):
    """The factor that keeps gradients in float16's range; the loss is divided by it again.

    A logit's gradient is its probability times the token's share of the mean, about 1e-9 for 256,000 pieces and 4,096
    tokens, and the smallest float16 is 6e-8. `LossScaleOptimizer` scales the loss that `from_hidden_states` returns:
    too late for gradients that are computed along with the loss. The scale is as large as sums over tokens allow:
    shares add up to 1 and a logit's gradient is at most its token's share, so no sum exceeds
    `scale * max(abs(hidden))`.

    Args:
        hidden: [B, T, D] in float16.
        shares: [B, T], the share of each token in the mean.

    Returns:
        A float32 scalar; no gradient flows through it.
    """
    largest = ops.cast(ops.max(ops.abs(ops.stop_gradient(hidden))), "float32")
    # Sums over tokens stay below half of float16's largest number, and a single token's gradient below 256, so that
    # sums over the vocabulary, whose weights are below 100, stay in range too.
    by_sum, by_token = 2.0**15 / ops.maximum(largest, 1.0), 2.0**8 / ops.maximum(ops.max(shares), 1e-30)
    return ops.stop_gradient(ops.minimum(by_sum, by_token))


class ChunkedLoss:
    """Computes a model's loss and accuracy from hidden states, and keeps their means.

    Args:
        loss: the `VocabularyCrossEntropy`.

    Attributes:
        metrics: the loss and the accuracy, means over all target tokens so far, however these are distributed over
            batches. Keras's own mean of the losses weighs batches by their rows.
    """

    def __init__(self, loss: VocabularyCrossEntropy):
        self.loss = loss
        self.metrics = [keras.metrics.Mean(name=name, dtype="float32") for name in ("loss", "accuracy")]

    def __call__(self, head, hidden, labels, weights, training: bool, more=0.0):
        """The loss of hidden states. Updates the accuracy.

        Args:
            head: the `VocabularyProjection`.
            hidden: [B, T, D], its input.
            labels: a batch's y.
            weights: the batch's sample weights, or None.
            training: whether gradients are needed.
            more: a scalar to add to the loss, such as the model's regularization.

        Returns:
            A float32 scalar, divided by the number of replicas.
        """
        loss, accuracy, total = self.loss.from_hidden_states(
            hidden,
            head.table(),
            labels,
            weights,
            cap=head.cap,
            training=training,
            train_table=bool(head.embedding.trainable_variables),
        )
        self._update_accuracy(accuracy, total)
        return (loss + more) / replicas()

    def update_from_logits(self, logits, labels, weights):
        """Updates the accuracy from logits.

        Args:
            logits: [B, T, V].
            labels: int [B, T].
            weights: the batch's sample weights, or None.
        """
        labels, weights = labels_and_weights(labels, weights)
        picked = ops.take_along_axis(logits, ops.expand_dims(labels, -1), axis=-1)[..., 0]
        correct = ops.cast(picked >= ops.max(logits, axis=-1), "float32")
        total = ops.sum(weights)
        self._update_accuracy(ops.divide_no_nan(ops.sum(correct * weights), total), total)

    def track(self, loss):
        """Updates the mean of the losses with the loss of a batch, weighted by the batch's tokens.

        Args:
            loss: the result of the model's `compute_loss`, which a subclass may have changed.
        """
        total, self._total = self._total, None
        self.metrics[0].update_state(ops.stop_gradient(loss * replicas()), sample_weight=total)

    def _update_accuracy(self, accuracy, total):
        self._total = total
        self.metrics[1].update_state(ops.stop_gradient(accuracy), sample_weight=total)


def _with_gradients(chunks, token_loss, targets, hidden, table, train_table):
    """`reference.sums` with a custom gradient, which the forward pass computes.

    Args:
        chunks: a `TokenChunks`.
        token_loss: as `VocabularyCrossEntropy.token_loss` returns it.
        targets: `(by_token, shared)`, the former cut into chunks.
        hidden: [B, T, D].
        table: [V, D].
        train_table: whether the table's gradient is needed.

    Returns:
        The sums, float32; the first is the loss.
    """
    kernels = implementation(cross_entropy.PACKAGE)

    @ops.custom_gradient
    def sums_of(hidden, table):
        x, shape = chunks.cut(hidden), ops.shape(hidden)
        sums, x_gradient, *table_gradient = kernels.sums_and_gradients(token_loss, targets, x, table, train_table)
        computed = [chunks.join(x_gradient, shape), *table_gradient]

        def gradients(*args, upstream=None):
            scale = ops.cast((args[-1] if upstream is None else upstream)[0], "float32")
            x_gradient, *table_gradient = kernels.scaled(computed, scale)
            return (
                ops.cast(x_gradient, hidden.dtype),
                ops.cast(table_gradient[0], table.dtype) if train_table else ops.zeros_like(table),
            )

        return sums, gradients

    return sums_of(hidden, kernels.tensor_of(table))
