"""`InBatchNegatives`: trains embeddings by contrast, each query's document against all others."""

from collections.abc import Sequence

import keras
from keras import ops

from keras_t5gemma.checks import is_integer
from keras_t5gemma.kernels.device import replicas

# Finite, so that a row without other candidates has a loss of 0 and no NaN in its gradient.
_EXCLUDED = -1e30


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class InBatchNegatives(keras.losses.Loss):
    """Cross-entropy of each query's own document among all documents and hard negatives of the batch (InfoNCE).

    Logits are cosines divided by the temperature. This is the loss of arXiv 1807.03748 with the negatives of arXiv
    1705.00652; sentence-transformers calls it MultipleNegativesRankingLoss.

    The same text may be in a batch twice, and would then be its own negative. For each query these are left out of the
    candidates: every other copy of its document, and the documents of other rows whose query is the same text.

    Args:
        temperature: divides the cosines; 0.05 as in arXiv 2104.08821.
        matryoshka: widths such as (768, 512, 256, 128). The loss is the mean of the losses of the first 768, 512, ...
            numbers of each embedding, so that embeddings may be cut to these widths afterwards (arXiv 2205.13147). None
            for the whole embeddings alone.
        symmetric: whether each document also has to find its own query among the batch's queries. The loss is then the
            mean of both.
        name: the loss's name.
        **kwargs: further arguments of `keras.losses.Loss`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        matryoshka: Sequence[int] | None = None,
        symmetric: bool = False,
        name: str = "in_batch_negatives",
        **kwargs,
    ):
        super().__init__(**{"reduction": "mean_with_sample_weight", "dtype": "float32", **kwargs}, name=name)
        if not temperature > 0:
            raise ValueError(f"`temperature` must be more than 0. Received: temperature={temperature!r}.")
        if matryoshka is not None:
            widths = list(matryoshka) if isinstance(matryoshka, (list, tuple)) else [None]
            if not widths or not all(is_integer(width) and width > 0 for width in widths):
                raise ValueError(
                    f"`matryoshka` must be positive integers such as (768, 256), or None. Received: {matryoshka!r}."
                )
            matryoshka = tuple(int(width) for width in widths)
        if not isinstance(symmetric, bool):
            raise ValueError(f"`symmetric` must be True or False. Received: symmetric={symmetric!r}.")
        self.temperature = temperature
        self.matryoshka = matryoshka
        self.symmetric = symmetric

    def call(self, y_true, y_pred):
        """The loss of each query.

        Args:
            y_true: [B, C], a number per text of the batch: equal for equal texts, negative in rows that are no
                candidates. Column 0 has the queries, column 1 their documents, further columns hard negatives.
            y_pred: [B, C, E], the embeddings of these texts, of any length.

        Returns:
            float32 [B].
        """
        self.check_width(y_pred.shape[-1])
        widths = self.matryoshka or (y_pred.shape[-1],)
        excluded = self._excluded(y_true)
        losses = sum(self._losses(excluded, y_pred[..., :width]) for width in widths)
        return losses / len(widths)

    def is_correct(self, y_true, y_pred):
        """Whether each query's own document has the largest cosine of all its candidates, by itself.

        Args:
            y_true: [B, C], as for `call`.
            y_pred: [B, C, E].

        Returns:
            float32 [B], 1 or 0.
        """
        logits = _logits(y_pred, self._excluded(y_true)[0])
        own = _own(logits)
        others = ops.where(_is_own(logits), _EXCLUDED, logits)
        return ops.cast(own > ops.max(others, axis=1), "float32")

    def check_width(self, width: int) -> None:
        """Raises a ValueError if embeddings of this width are narrower than one of `matryoshka`."""
        if self.matryoshka and max(self.matryoshka) > width:
            raise ValueError(
                f"`matryoshka` must have no width above that of the embeddings, {width}. Received: {self.matryoshka}."
            )

    def _losses(self, excluded, y_pred):
        """Losses [B] of embeddings of one width."""
        of_documents, of_queries = excluded
        logits = _logits(y_pred, of_documents) / self.temperature
        losses = ops.logsumexp(logits, axis=1) - _own(logits)
        if self.symmetric:
            reversed_pairs = ops.stack([y_pred[:, 1], y_pred[:, 0]], axis=1)
            logits = _logits(reversed_pairs, of_queries) / self.temperature
            losses = (losses + ops.logsumexp(logits, axis=1) - _own(logits)) / 2
        return losses

    def _excluded(self, numbers):
        """The candidates that do not count.

        Returns:
            `(of_documents, of_queries)`: bool [B, (C - 1) B], for each query the documents, then the hard negatives
            column by column; and bool [B, B], for each document the queries.
        """
        numbers = ops.cast(numbers, "int32")
        queries, documents, candidates = numbers[:, 0], numbers[:, 1], ops.transpose(numbers[:, 1:])
        absent = candidates < 0
        is_same_query = queries[:, None] == queries[None, :]
        is_same_text = documents[:, None, None] == candidates[None, :, :]  # [B, C - 1, B]
        of_queries = is_same_query | is_same_text[:, 0]
        blocks = ops.concatenate([of_queries[:, None], is_same_text[:, 1:]], axis=1) | absent[None]
        return ops.reshape(blocks, (ops.shape(numbers)[0], -1)), of_queries | absent[:1]

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "temperature": self.temperature,
            "matryoshka": self.matryoshka,
            "symmetric": self.symmetric,
        }


def _logits(y_pred, excluded):
    """Cosines [B, (C - 1) B] of the first column's texts with those of all others, without the excluded ones."""
    y_pred = ops.cast(y_pred, "float32")
    squares = ops.sum(ops.square(y_pred), axis=-1, keepdims=True)
    unit = y_pred * ops.rsqrt(ops.maximum(squares, 1e-24))  # a vector of zeros stays one
    cosines = ops.einsum("bd,kcd->bck", unit[:, 0], unit[:, 1:])
    cosines = ops.reshape(cosines, ops.shape(excluded))
    return ops.where(excluded & ~_is_own(cosines), _EXCLUDED, cosines)


def _is_own(logits):
    """Bool [B, (C - 1) B], where a query's own document is."""
    rows, candidates = ops.shape(logits)
    return ops.arange(rows)[:, None] == ops.arange(candidates)[None, :]


def _own(logits):
    """The logit [B] of each query's own document."""
    return ops.sum(ops.where(_is_own(logits), logits, 0.0), axis=1)


class ContrastMeans:
    """Computes a model's loss and accuracy from embeddings, and keeps their means over pairs.

    Args:
        loss: the `InBatchNegatives`.

    Attributes:
        metrics: the loss and the accuracy.
    """

    def __init__(self, loss: InBatchNegatives):
        self.loss = loss
        self.metrics = [keras.metrics.Mean(name=name, dtype="float32") for name in ("loss", "accuracy")]
        self._total = None

    def __call__(self, numbers, embeddings, weights):
        """The loss of a batch. Updates the accuracy.

        Args:
            numbers: [B, C], as for `InBatchNegatives.call`.
            embeddings: [B, C, E].
            weights: [B], or None.

        Returns:
            A float32 scalar.
        """
        correct = ops.stop_gradient(self.loss.is_correct(numbers, embeddings))
        weights = ops.ones_like(correct) if weights is None else ops.cast(weights, "float32")
        self._total = ops.sum(weights)
        self.metrics[1].update_state(correct, sample_weight=weights)
        return self.loss(numbers, embeddings, weights)

    def skip(self) -> None:
        """Says that the loss which `track` gets next is not one of pairs."""
        self._total = None

    def track(self, loss):
        """Updates the mean of the losses with the loss of a batch, weighted by its pairs.

        Args:
            loss: the result of the model's `compute_loss`.
        """
        total, self._total = self._total, None
        if total is not None:
            self.metrics[0].update_state(ops.stop_gradient(loss * replicas()), sample_weight=total)
