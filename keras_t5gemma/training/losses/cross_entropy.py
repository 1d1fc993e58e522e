"""Cross-entropy over a large vocabulary without its logits: [B, T, 256000] of float32 never exists.

Tokens go through the output projection, the soft cap and the softmax a chunk at a time, and the gradients with respect
to hidden states and table are formed in the same pass, so that nothing is computed twice: three products of
tokens x vocabulary x width, as many as the plain loss takes.
"""

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

    On logits it is a plain Keras loss. A `T5GemmaSeq2SeqLM` compiled with it, which is the default, never makes the
    logits: see `from_hidden_states`, which gives the same value and gradients.

    Args:
        z_loss: weight of `log(sum(exp(logits))) ** 2`, which keeps logits from drifting; 1e-4 in PaLM (arXiv
            2204.02311).
        label_smoothing: share of the target spread evenly over the vocabulary.
        name: the loss's name.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, z_loss=0.0, label_smoothing=0.0, name="vocabulary_cross_entropy", **kwargs):
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
        """Losses [B, T] of labels [B, T] and logits [B, T, V], capped already; 0 at labels of -100."""
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
        self, hidden, table, labels, weights=None, *, cap=None, training=True, train_table=True, chunk_bytes=None
    ):
        """The mean loss and the share of tokens whose label has the largest logit, without the logits.

        Args:
            hidden: [B, T, D] what the projection takes, in the compute dtype.
            table: [V, D], the projection; its gradient has its dtype.
            labels: int [B, T]; -100 has weight 0, and at weight 0 any number will do.
            weights: [B, T], 0 at padding; or [B], one per row; equal if None.
            cap: soft cap on the logits, or None.
            training: whether gradients will be asked for.
            train_table: whether the table's is among them; without it a third of the work is saved.
            chunk_bytes: bytes of float32 logits at once on a device; `default_chunk_bytes` if None. Changes time and
                memory, not the result.

        Returns:
            `(loss, accuracy, total weight)`, float32 scalars; no gradient flows through the latter two.
        """
        y, (labels, weights) = labels, labels_and_weights(self.labels_of(labels), weights, hidden.shape[:-1])
        total = ops.sum(weights)
        # Keras's own reduction: a batch of nothing but padding has loss zero.
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

    def labels_of(self, y, vocabulary_size=None):  # noqa: ARG002 for losses whose y is more
        """The labels [B, T] in what a batch has as y, which is checked; against a vocabulary, where that is given."""
        return y

    def token_loss(self, cap, y, labels, shares):  # noqa: ARG002 for losses whose y is more
        """The loss of each token, and the arrays that it needs.

        Args:
            cap: soft cap on the logits, or None.
            y: a batch's.
            labels: its labels, int32 [B, T], all of them in the vocabulary.
            shares: [B, T], of each token in the mean.

        Returns:
            `(token_loss, by_token, shared)`: a `CrossEntropy`; arrays [B, T, ...] of which it wants each chunk's part,
            and arrays that it wants whole.
        """
        return CrossEntropy(cap, self.z_loss, self.label_smoothing), (labels, shares), ()

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "z_loss": self.z_loss, "label_smoothing": self.label_smoothing}


def is_float16(x):
    """Whether a tensor's numbers are float16, in which gradients of a large vocabulary vanish unless scaled."""
    return keras.backend.standardize_dtype(x.dtype) == "float16"


def float16_scale(hidden, shares):
    """What the loss is multiplied by while its gradients pass through float16, and divided by after.

    A logit's gradient is its probability times the token's share of the mean, about 1e-9 for 256,000 pieces and 4,096
    tokens, and float16 ends at 6e-8. `LossScaleOptimizer` scales the loss that this one returns: too late for gradients
    that are formed along with it. The scale is as large as sums over tokens allow: shares add up to 1 and a logit's
    gradient is at most its token's share, so no sum exceeds `scale * max(abs(hidden))`.

    Args:
        hidden: [B, T, D] in float16.
        shares: [B, T], of each token in the mean.

    Returns:
        A float32 scalar; no gradient flows through it.
    """
    largest = ops.cast(ops.max(ops.abs(ops.stop_gradient(hidden))), "float32")
    # Half of float16's largest number for sums over tokens, and 256 for a single token's gradient: sums over the
    # vocabulary, whose weights are below 100, stay in range, too.
    by_sum, by_token = 2.0**15 / ops.maximum(largest, 1.0), 2.0**8 / ops.maximum(ops.max(shares), 1e-30)
    return ops.stop_gradient(ops.minimum(by_sum, by_token))


class ChunkedLoss:
    """What a model's training step does in place of logits, loss and accuracy.

    Args:
        loss: the `VocabularyCrossEntropy`.

    Attributes:
        metrics: the loss and the share of right tokens, means over all target tokens so far, however they lie in
            batches. Keras's own mean of the losses weighs batches by their rows.
    """

    def __init__(self, loss):
        self.loss = loss
        self.metrics = [keras.metrics.Mean(name=name, dtype="float32") for name in ("loss", "accuracy")]

    def __call__(self, head, hidden, labels, weights, training, more=0.0):
        """The loss of hidden states [B, T, D] that `head`, a `VocabularyProjection`, would project.

        Args:
            head: the `VocabularyProjection`.
            hidden: what it takes.
            labels: a batch's y.
            weights: its weights, or None.
            training: whether gradients will be asked for.
            more: what is added to the loss, such as the model's regularization.
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
        self._update(loss + more, accuracy, total)
        return loss / replicas() + more

    def update_from_logits(self, loss, logits, labels, weights):
        """Keeps the loss of logits [B, T, V], and their accuracy."""
        labels, weights = labels_and_weights(labels, weights)
        picked = ops.take_along_axis(logits, ops.expand_dims(labels, -1), axis=-1)[..., 0]
        correct = ops.cast(picked >= ops.max(logits, axis=-1), "float32")
        total = ops.sum(weights)
        self._update(loss * replicas(), ops.divide_no_nan(ops.sum(correct * weights), total), total)

    def _update(self, loss, accuracy, total):
        for metric, value in zip(self.metrics, (loss, accuracy), strict=True):
            metric.update_state(ops.stop_gradient(value), sample_weight=total)


def _with_gradients(chunks, token_loss, targets, hidden, table, train_table):
    """`reference.sums`; the gradients of hidden states [B, T, D] and table [V, D] are formed in the same pass."""
    kernels = implementation(cross_entropy.PACKAGE)

    @ops.custom_gradient
    def sums_of(hidden, table):
        x, shape = chunks.cut(hidden), ops.shape(hidden)
        sums, x_gradient, *table_gradient = kernels.sums_and_gradients(token_loss, targets, x, table, train_table)
        formed = [chunks.join(x_gradient, shape), *table_gradient]

        def gradients(*args, upstream=None):
            scale = ops.cast((args[-1] if upstream is None else upstream)[0], "float32")
            x_gradient, *table_gradient = kernels.scaled(formed, scale)
            return (
                ops.cast(x_gradient, hidden.dtype),
                ops.cast(table_gradient[0], table.dtype) if train_table else ops.zeros_like(table),
            )

        return sums, gradients

    return sums_of(hidden, kernels.tensor_of(table))
