"""`T5GemmaTokenClassifier`: a class for each word of a text."""

from collections.abc import Sequence

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_t5gemma.checkpoints.hugging_face.heads import TOKENS, Head
from keras_t5gemma.heads.classifier import Classifier
from keras_t5gemma.heads.saved_options import options_to_save
from keras_t5gemma.heads.targets import class_ids
from keras_t5gemma.heads.word_inputs import OPTIONS, T5GemmaTokenClassifierPreprocessor
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.encoder import T5GemmaEncoder
from keras_t5gemma.training.losses.labels import labels_and_weights


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class LabelledCrossEntropy(keras.losses.Loss):
    """The mean cross-entropy over the positions whose label is not -100, as in `transformers`.

    Args:
        name: the loss's name.
        **kwargs: `dtype`.
    """

    def __init__(self, name: str = "labelled_cross_entropy", **kwargs):
        super().__init__(name=name, reduction="mean_with_sample_weight", **kwargs)

    def __call__(self, y_true, y_pred, sample_weight=None):
        """The mean.

        Args:
            y_true: labels [B, S].
            y_pred: logits [B, S, C].
            sample_weight: [B, S], [B] or None.
        """
        labels, weights = labels_and_weights(y_true, sample_weight)
        losses = keras.losses.sparse_categorical_crossentropy(labels, ops.cast(y_pred, "float32"), from_logits=True)
        return ops.divide_no_nan(ops.sum(losses * weights), ops.sum(weights))

    def labels_of(self, y):
        """The labels among the targets: the targets."""
        return y

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {"name": self.name}


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class LabelledAccuracy(keras.metrics.Mean):
    """The share of labels that are right, among those that are not -100."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch: labels [B, S], logits [B, S, C], weights [B, S], [B] or None."""
        labels, weights = labels_and_weights(y_true, sample_weight)
        is_right = ops.equal(ops.cast(ops.argmax(y_pred, axis=-1), "int32"), labels)
        return super().update_state(ops.cast(is_right, "float32"), sample_weight=weights)


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaTokenClassifier(Classifier, keras_hub.models.Task):
    """Classifies words: a dense layer on each hidden state, as `T5GemmaForTokenClassification`.

    Texts are lists of words, and labels are lists of the same lengths, ids or names. A word's first piece stands for
    it: the other pieces have the label -100, which does not count. `predict` gives logits [B, S, C] of pieces,
    `classify` gives a class per word.

    Args:
        backbone: a `T5GemmaEncoder`, or a `T5GemmaBackbone`, of which `stack="encoder"` uses the encoder alone.
        num_classes: C.
        preprocessor: a `T5GemmaTokenClassifierPreprocessor`, or None for token ids and labels [B, S].
        stack: "encoder"; or "decoder", the encoder-decoder mode of `transformers`: the decoder reads the text moved one
            to the right after `<bos>`, so at each position it has seen the pieces before that position, and all pieces
            through cross-attention.
        dropout: the rate before the head.
        labels: names of the classes, in the order of their ids, or None.
        **kwargs: `name`, `trainable`, and `compile=False` to leave the model uncompiled.

    Raises:
        ValueError: if an argument is invalid, or `labels` does not match `num_classes`.

    Example:
        >>> tagger = kt.T5GemmaTokenClassifier.from_preset(
        ...     "t5gemma_b_b_ul2", num_classes=3, labels=["O", "PERSON", "PLACE"]
        ... )
        >>> tagger.fit([["Ann", "lives", "in", "Ulm"]], [["PERSON", "O", "O", "PLACE"]])
        >>> tagger.classify([["Tom", "was", "there"]])
    """

    preprocessor_cls = T5GemmaTokenClassifierPreprocessor
    labels_each_position = True
    ARCHITECTURE = TOKENS
    SAVED = ("num_classes", "stack", "dropout", "labels")

    def __init__(
        self,
        backbone: T5GemmaBackbone | T5GemmaEncoder,
        num_classes: int,
        preprocessor: T5GemmaTokenClassifierPreprocessor | None = None,
        *,
        stack: str = "encoder",
        dropout: float = 0.0,
        labels: Sequence[str] | None = None,
        **kwargs,
    ):
        arguments = {"stack": stack, "dropout": dropout, "labels": labels, "kwargs": kwargs}
        self._build(backbone, num_classes, preprocessor, lambda hidden, *_: hidden, **arguments)

    def auto_loss(self) -> keras.losses.Loss:
        """The mean cross-entropy over labelled positions."""
        return LabelledCrossEntropy()

    def auto_metrics(self) -> list:
        """The accuracy over labelled positions."""
        return [LabelledAccuracy(name="accuracy")]

    def targets(self, y) -> np.ndarray:
        """Labels of `fit` as int32 [B, S], checked."""
        array = np.asarray(y)
        if array.ndim != 2:
            raise ValueError(f"`y` must hold a label per position of `token_ids`, [B, S]. Received: {array.shape}.")
        if array.dtype.kind == "O":
            flat = [self._id_of(label) for label in array.flat]
            array = np.array(flat, "int32").reshape(array.shape)
        return class_ids(array, self.num_classes, self.labels, ignored=True)

    def _id_of(self, label) -> int:
        return int(class_ids([label], self.num_classes, self.labels, ignored=True)[0])

    def columns(self, x, y, sample_weight) -> tuple:
        """A batch of texts in words as inputs, labels of pieces and weights."""
        return (
            keras.utils.unpack_x_y_sample_weight(self.preprocessor.call(x, y, sample_weight))
            if y is not None
            else (self.preprocessor.call(x), None, sample_weight)
        )

    def classify(self, x: Sequence[Sequence[str]], *, batch_size: int = 32) -> list[list]:
        """The class of each word.

        Args:
            x: B lists of words.
            batch_size: texts per batch.

        Returns:
            Per text a list of names, or of ids without `labels`; None for words that `truncate` cut off.

        Raises:
            ValueError: if the model has no preprocessor, or as for `predict`.
        """
        if self.preprocessor is None:
            raise ValueError("`classify` needs a preprocessor, which splits words into pieces. Call `predict` on ids.")
        _, starts = self.preprocessor.pieces(x)
        logits = self.predict(x, batch_size=batch_size, verbose=0)
        classes = [self.names_of(row) for row in logits.argmax(axis=2)]
        return [
            [None if first is None else row[first] for first in firsts]
            for row, firsts in zip(classes, starts, strict=True)
        ]

    def hugging_face_head(self) -> tuple[Head, dict | None]:
        """The head and the preprocessor's options, for `export_to_hugging_face`."""
        kernel, bias = (np.asarray(ops.convert_to_numpy(v), "float32") for v in (self.head.kernel, self.head.bias))
        head = Head(TOKENS, self.num_classes, self.labels, "single", self.dropout_rate, kernel, bias)
        return head, None if self.preprocessor is None else options_to_save(self.preprocessor, OPTIONS)
