"""Several answers per prompt: one encoder pass, a decoder row per answer; and losses of them."""

import abc
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_t5gemma.data.pipelines.teacher_view import LABELS
from keras_t5gemma.kernels.device import replicas
from keras_t5gemma.training.losses.labels import IGNORED_LABEL
from keras_t5gemma.training.losses.log_probs import target_log_probs


def answer_hidden_states(lm, inputs: Mapping[str, Any], training: bool | None):
    """The decoder's last hidden states of several answers per prompt, each prompt encoded once.

    The encoder's output is repeated per answer, so its gradient is the sum over a prompt's answers. Axis 0 is divided
    over devices as before: the answers of a prompt stay together.

        encoder_token_ids  [B, S]       prompt 0         prompt 1
        decoder_token_ids  [B, A, T]    answers 0 and 1  answers 0 and 1
        result [B A, T, D]              0 0, 0 1,        1 0, 1 1         (prompt, answer)

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: `encoder_token_ids` and `encoder_padding_mask` [B, S]; `decoder_token_ids` and `decoder_padding_mask`
            [B, A, T].
        training: whether dropout is on.

    Returns:
        [B A, T, D], the input of `lm.head`; answer a of prompt b is row `b A + a`.
    """
    encoder, decoder = lm.backbone.encoder, lm.backbone.decoder
    mask = inputs["encoder_padding_mask"]
    output = encoder(inputs["encoder_token_ids"], mask, training=training)
    count = inputs["decoder_token_ids"].shape[1]
    token_ids, decoder_mask = (
        ops.reshape(inputs[name], (-1, inputs[name].shape[2])) for name in ("decoder_token_ids", "decoder_padding_mask")
    )
    return decoder(token_ids, decoder_mask, repeated(output, count), repeated(mask, count), training=training)


def repeated(x, count: int):
    """Each row of x [B, ...] as many times as a prompt has answers, [B A, ...]: rows 0 0 1 1 for A = 2."""
    shape = ops.shape(x)
    # A broadcast, not a gather: on several devices a row stays where it is.
    x = ops.broadcast_to(ops.expand_dims(x, 1), (shape[0], count, *shape[1:]))
    return ops.reshape(x, (-1, *shape[1:]))


def answer_log_probs(lm, inputs: Mapping[str, Any], labels, training: bool):
    """The log-probability of each token of several answers per prompt, in nats, without the logits.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: as for `answer_hidden_states`.
        labels: int [B, A, T], -100 where there is none.
        training: whether dropout is on, and gradients are needed.

    Returns:
        `(log_probs, counts)`: float32 [B, A, T], the log-probabilities, 0 where there is no label; and 1 where there is
        one, else 0.

    Raises:
        ValueError: if the decoder's embedding is quantized.
    """
    head = lm.head
    if head.is_quantized:
        raise ValueError(
            "Losses of answers need a decoder's embedding that is not quantized: they have no gradient through one. "
            "Quantize with `filters` that leave the embeddings out."
        )
    hidden = answer_hidden_states(lm, inputs, training)
    counts = labels != IGNORED_LABEL
    rows = ops.reshape(ops.where(counts, labels, 0), (-1, labels.shape[2]))
    log_probs = target_log_probs(
        hidden, head.table(), rows, head.cap, train_table=training and bool(head.embedding.trainable_variables)
    )
    return ops.where(counts, ops.reshape(log_probs, ops.shape(labels)), 0.0), ops.cast(counts, "float32")


class AnswerLoss(keras.losses.Loss, abc.ABC):
    """A loss of several answers per prompt, which a `T5GemmaSeq2SeqLM` computes from its batches without logits.

    A batch is `(x, y, sample_weight)`: x as for `answer_hidden_states`; y a dict with `labels` [B, A, T], -100 where
    there is none, and further arrays [B, ...]; weights [B], one per prompt. The loss is the weighted mean over prompts.

    Attributes:
        batches_from: the function that makes the batches, for errors.
    """

    batches_from: str = ""

    def __init__(self, name: str, **kwargs):
        # Parts of a batch add up by the weights of their prompts: see `Accumulation`.
        super().__init__(**{"reduction": "mean_with_sample_weight", **kwargs}, name=name)
        if self.reduction != "mean_with_sample_weight":
            raise ValueError(
                f'`reduction` must be "mean_with_sample_weight": the loss is a mean over prompts. Received: '
                f"reduction={self.reduction!r}."
            )

    def metrics(self) -> list[keras.metrics.Metric]:
        """New metrics that `fit` and `evaluate` report besides the loss."""
        return []

    def check_batch(self, x: Mapping[str, Any], y: Mapping[str, Any]) -> None:
        """Raises a ValueError if a batch lacks what the loss reads."""

    @abc.abstractmethod
    def of_batch(self, lm, x: Mapping[str, Any], y: Mapping[str, Any], weights, training: bool):
        """The loss of a batch.

        Args:
            lm: the `T5GemmaSeq2SeqLM`.
            x: the inputs.
            y: labels and further arrays.
            weights: float32 [B].
            training: whether dropout is on, and gradients are needed.

        Returns:
            `(loss, values)`: a float32 scalar; and metric name -> (value [B] or scalar, weights [B] or scalar).
        """

    def call(self, y_true, y_pred):  # noqa: ARG002 Keras's signature
        """Refuses logits, of which the loss is not a function."""
        raise ValueError(
            f"`{type(self).__name__}` is a loss of whole answers, not of logits: pass it to "
            f"`T5GemmaSeq2SeqLM.compile(loss=...)`, which computes it in `fit` and `evaluate`."
        )


class AnswerMeans:
    """Computes a model's `AnswerLoss`, and keeps the means of the loss and of its metrics over prompts.

    Args:
        loss: the `AnswerLoss`.

    Attributes:
        metrics: the loss and its metrics.
    """

    def __init__(self, loss: AnswerLoss):
        self.loss = loss
        self.metrics = [keras.metrics.Mean(name="loss", dtype="float32"), *loss.metrics()]

    def of_batch(self, lm, x, y, weights, training: bool, more=0.0):
        """The loss of a batch. Updates the metrics.

        Args:
            lm: the `T5GemmaSeq2SeqLM`.
            x: the inputs.
            y: labels and further arrays.
            weights: [B], or None for equal weights.
            training: whether gradients are needed.
            more: a function of no arguments, called afterwards, whose scalar is added to the loss.

        Returns:
            A float32 scalar, divided by the number of replicas.
        """
        rows = ops.shape(y[LABELS])[0]
        weights = ops.ones((rows,), "float32") if weights is None else ops.cast(weights, "float32")
        loss, values = self.loss.of_batch(lm, x, y, weights, training)
        self._total = ops.sum(weights)
        by_name = {metric.name: metric for metric in self.metrics}
        for name, (value, value_weights) in values.items():
            by_name[name].update_state(ops.stop_gradient(value), sample_weight=value_weights)
        return (loss + more()) / replicas()

    def track(self, loss):
        """Updates the mean of the losses with the loss of a batch, weighted by its prompts.

        Args:
            loss: the result of the model's `compute_loss`, which a subclass may have changed.
        """
        total, self._total = self._total, None
        self.metrics[0].update_state(ops.stop_gradient(loss * replicas()), sample_weight=total)
