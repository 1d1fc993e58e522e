"""`T5GemmaTextClassifier`: classes of texts, or numbers, from the last token or the mean."""

from collections.abc import Sequence

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_t5gemma.checkpoints.hugging_face.heads import SEQUENCES, Head
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.heads.classifier import Classifier
from keras_t5gemma.heads.saved_options import options_to_save
from keras_t5gemma.heads.targets import PROBLEMS, TARGETS
from keras_t5gemma.heads.text_inputs import OPTIONS, T5GemmaTextClassifierPreprocessor
from keras_t5gemma.layers.pooling import POOLINGS, Pooling
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.encoder import T5GemmaEncoder
from keras_t5gemma.suggestions import check_choice


@keras.saving.register_keras_serializable(package="keras_t5gemma")
def sign_accuracy(y_true, y_pred):
    """The share of classes whose logit [B, C] has the right sign, [B]."""
    is_right = ops.equal(ops.cast(y_true, "float32") > 0.5, y_pred > 0)
    return ops.mean(ops.cast(is_right, "float32"), axis=-1)


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaTextClassifier(Classifier, keras_hub.models.TextClassifier):
    """Classifies texts: a dense layer on one hidden state per text, as `T5GemmaForSequenceClassification`.

    `pooling="last"` on the encoder, the default, is what arXiv 2504.06225 fine-tunes on SuperGLUE. `stack="decoder"` is
    the encoder-decoder mode of `transformers`: the decoder reads the text moved one to the right after `<bos>`, and its
    position behind the last token is the text's vector. The position is at most the row's last one, so a text that
    fills `sequence_length` is read one token early: leave a position free.

    The forms of labels, and the default loss and metric of `compile`:

        problem       y                                            loss                   metric
        "single"      ids [B] or names [B]                         cross-entropy          accuracy
        "multi"       0 or 1 [B, C], or a list of names per text   binary cross-entropy   share of right signs
        "regression"  numbers [B] or [B, C]                        squared error          absolute error

    `predict` gives logits [B, C], as in keras-hub; `classify` gives names and probabilities.

    Args:
        backbone: a `T5GemmaEncoder`, or a `T5GemmaBackbone`, of which `stack="encoder"` uses the encoder alone.
        num_classes: C.
        preprocessor: a `T5GemmaTextClassifierPreprocessor`, or None for token ids.
        pooling: "last" for the last token, "mean" for the mean of all tokens.
        stack: "encoder" or "decoder".
        dropout: the rate before the head.
        problem: "single", "multi" or "regression".
        labels: names of the classes, in the order of their ids, or None.
        **kwargs: `name`, `trainable`, and `compile=False` to leave the model uncompiled.

    Raises:
        ValueError: if an argument is invalid, or `labels` does not match `num_classes`.

    Example:
        >>> classifier = kt.T5GemmaTextClassifier.from_preset(
        ...     "t5gemma_b_b_ul2", num_classes=2, labels=["bad", "good"]
        ... )
        >>> classifier.fit(["a fine film", "a waste of time"], ["good", "bad"])
        >>> classifier.classify(["what a film"])
    """

    preprocessor_cls = T5GemmaTextClassifierPreprocessor
    ARCHITECTURE = SEQUENCES
    SAVED = ("num_classes", "pooling", "stack", "dropout", "problem", "labels")

    def __init__(
        self,
        backbone: T5GemmaBackbone | T5GemmaEncoder,
        num_classes: int,
        preprocessor: T5GemmaTextClassifierPreprocessor | None = None,
        *,
        pooling: str = "last",
        stack: str = "encoder",
        dropout: float = 0.0,
        problem: str = "single",
        labels: Sequence[str] | None = None,
        **kwargs,
    ):
        check_choice(pooling, "pooling", POOLINGS)
        check_choice(problem, "problem", PROBLEMS)
        self.pooling, self.problem = pooling, problem

        arguments = {"stack": stack, "dropout": dropout, "labels": labels, "kwargs": kwargs}
        self._build(backbone, num_classes, preprocessor, Pooling(pooling, name="pooling"), **arguments)

    def auto_loss(self) -> keras.losses.Loss:
        """The loss of the problem."""
        if self.problem == "single":
            return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if self.problem == "multi":
            return keras.losses.BinaryCrossentropy(from_logits=True)
        return keras.losses.MeanSquaredError()

    def auto_metrics(self) -> list:
        """The metric of the problem."""
        if self.problem == "single":
            return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        if self.problem == "multi":
            return [keras.metrics.MeanMetricWrapper(sign_accuracy, name="accuracy")]
        return [keras.metrics.MeanAbsoluteError(name="mean_absolute_error")]

    def targets(self, y) -> np.ndarray:
        """Labels of `fit` as the arrays of the loss, checked."""
        return TARGETS[self.problem](y, self.num_classes, self.labels)

    def columns(self, x, y, sample_weight) -> tuple:
        """A batch of texts as inputs, labels and weights."""
        return self.preprocessor.call(x), y, sample_weight

    def classify(self, x, *, batch_size: int = 32, probabilities: bool = False) -> list:
        """The class of each text.

        Args:
            x: texts, or pairs, as for `predict`.
            batch_size: texts per batch.
            probabilities: whether to give the probability of each class instead.

        Returns:
            Per text: a name (an id without `labels`) for "single"; a list of those above a probability of 1/2 for
            "multi"; a number, or C of them, for "regression". With `probabilities`, a dict from each class to its
            probability.

        Raises:
            ValueError: as for `predict`; also if `probabilities` are asked of a regression.
        """
        logits = self.predict(x, batch_size=batch_size, verbose=0).astype("float64")
        if self.problem == "regression":
            if probabilities:
                raise ValueError("A regression has no `probabilities`. Leave the argument out.")
            return (logits[:, 0] if self.num_classes == 1 else logits).tolist()
        if probabilities:
            values = 1 / (1 + np.exp(-logits)) if self.problem == "multi" else _softmax(logits)
            names = self.names_of(np.arange(self.num_classes))
            return [dict(zip(names, row, strict=True)) for row in values.tolist()]
        if self.problem == "multi":
            return [self.names_of(np.flatnonzero(row > 0)) for row in logits]
        return self.names_of(logits.argmax(axis=1))

    def hugging_face_head(self) -> tuple[Head, dict | None]:
        """The head and the preprocessor's options, for `export_to_hugging_face`.

        Raises:
            CheckpointError: if `transformers` could not compute the model.
        """
        if self.pooling != "last":
            raise CheckpointError(
                f"`transformers` reads the last token only. Received: a model with pooling={self.pooling!r}. Keep it "
                f"with `save_to_preset`, or export its encoder: `export_to_hugging_face(model.backbone, folder)`."
            )
        kernel, bias = (np.asarray(ops.convert_to_numpy(v), "float32") for v in (self.head.kernel, self.head.bias))
        head = Head(SEQUENCES, self.num_classes, self.labels, self.problem, self.dropout_rate, kernel, bias)
        return head, None if self.preprocessor is None else options_to_save(self.preprocessor, OPTIONS)

    def get_config(self) -> dict:
        """The constructor's arguments, JSON-ready."""
        return {**super().get_config(), "pooling": self.pooling, "problem": self.problem}


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [B, C]."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
