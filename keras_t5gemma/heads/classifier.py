"""`Classifier`: what the classifiers of texts and of tokens have in common."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import keras
import numpy as np

from keras_t5gemma._keras_internals import forget_compiled_metrics, track_loss_in_float32
from keras_t5gemma.checks import integer, is_number
from keras_t5gemma.heads.any_backbone import BACKBONES
from keras_t5gemma.heads.labelled_data import IDS, MASK, FitsLabelled
from keras_t5gemma.heads.loading import classifier_from_preset
from keras_t5gemma.heads.shifted_inputs import ShiftedInputs
from keras_t5gemma.heads.targets import check_labels
from keras_t5gemma.hub import PresetFolder
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.encoder import T5GemmaEncoder
from keras_t5gemma.models.guarded import Guarded
from keras_t5gemma.models.quantization import QuantizationMixin
from keras_t5gemma.models.recompilation import RecompilationMixin
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.suggestions import check_choice, check_keywords
from keras_t5gemma.training.losses.checks import check_reads_logits
from keras_t5gemma.training.optimizers.factory import resolve_optimizer
from keras_t5gemma.training.steps.accumulation import Accumulation
from keras_t5gemma.training.steps.model import OwnSteps

STACKS = ("encoder", "decoder")


class Classifier(OwnSteps, RecompilationMixin, FitsLabelled, Guarded, QuantizationMixin):
    """Mixed into a keras-hub task: a dense layer `classes` on the hidden states of a stack.

    The head computes in float32, whatever the dtype of the stacks, and is not quantized.

    Attributes:
        labels_each_position: whether labels are [B, S] rather than one row per text.
    """

    backbone_cls = BACKBONES
    presets = PRESETS
    labels_each_position = False

    def _build(
        self,
        backbone: T5GemmaBackbone | T5GemmaEncoder,
        num_classes: int,
        preprocessor,
        pool: Callable,
        *,
        stack: str,
        dropout: float,
        labels: Sequence[str] | None,
        kwargs: Mapping,
    ) -> None:
        """Checks the arguments that all classifiers share, and builds the model.

        Args:
            backbone: of `__init__`, like the following arguments.
            num_classes: the number of classes.
            preprocessor: the preprocessor or None.
            pool: `(hidden states [B, S, D], their mask [B, S]) -> x`, what the head reads.
            stack: "encoder" or "decoder".
            dropout: the rate.
            labels: names of the classes, or None.
            kwargs: further keyword arguments.
        """
        check_keywords(type(self), kwargs, ("name", "trainable", "compile"))
        check_choice(stack, "stack", STACKS)
        if preprocessor is not None and not isinstance(preprocessor, self.preprocessor_cls):
            raise ValueError(
                f"`preprocessor` must be a {self.preprocessor_cls.__name__}, or None. Received: {preprocessor!r:.80}."
            )
        if not isinstance(backbone, (T5GemmaBackbone, T5GemmaEncoder)):
            raise ValueError(f"`backbone` must be a T5GemmaBackbone or a T5GemmaEncoder. Received: {backbone!r:.80}.")
        if stack == "decoder" and not isinstance(backbone, T5GemmaBackbone):
            raise ValueError('stack="decoder" needs a T5GemmaBackbone. Received: a T5GemmaEncoder, which has none.')
        if not is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={dropout!r}.")
        self.num_classes = integer(num_classes, "num_classes")
        if self.num_classes == 1 and getattr(self, "problem", "single") == "single":
            raise ValueError(
                "`num_classes` must be at least 2: a single class has the probability 1, whatever the model computes. "
                'For one number per text, T5GemmaTextClassifier has problem="multi" and problem="regression". '
                f"Received: num_classes={num_classes!r}."
            )
        self.labels = check_labels(labels, self.num_classes)
        self.stack, self.dropout_rate = stack, float(dropout)
        if stack == "encoder" and isinstance(backbone, T5GemmaBackbone):
            backbone = T5GemmaEncoder.from_backbone(backbone)  # the decoder's weights would not be trained
        self.backbone, self.preprocessor = backbone, preprocessor
        _check_vocabulary(backbone, preprocessor)
        inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in (IDS, MASK)}
        if stack == "encoder":
            config, hidden, mask = backbone.config.encoder, backbone(inputs), inputs[MASK]
        else:
            config = backbone.config.decoder
            ids, mask = ShiftedInputs(name="shifted", dtype="int32")(inputs[IDS])
            hidden = backbone(
                {
                    "encoder_token_ids": inputs[IDS],
                    "encoder_padding_mask": inputs[MASK],
                    "decoder_token_ids": ids,
                    "decoder_padding_mask": mask,
                }
            )["decoder_sequence_output"]
        x = keras.layers.Dropout(self.dropout_rate, dtype="float32", name="head_dropout")(pool(hidden, mask))
        # As in `transformers`: normal with initializer_range / sqrt(num_labels), and a bias of zeros.
        normal = keras.initializers.RandomNormal(stddev=config.initializer_range * self.num_classes**-0.5)
        # Not "logits": `layout_map` divides an output of that name along the vocabulary.
        head = keras.layers.Dense(self.num_classes, kernel_initializer=normal, dtype="float32", name="classes")
        super().__init__(inputs=inputs, outputs=head(x), **kwargs)
        self.head = head
        self.backbone = backbone  # again: above, PyTorch's module did not exist yet and would miss its parameters

    def auto_loss(self) -> keras.losses.Loss:
        """The loss of `compile(loss="auto")`."""
        raise TypeError(f"{type(self).__name__} has no loss.")

    def auto_metrics(self) -> list:
        """The metrics of `compile(weighted_metrics="auto")`."""
        return []

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "auto",
        loss: str | keras.losses.Loss = "auto",
        *,
        weighted_metrics: str | Sequence | None = "auto",
        accumulation_steps: int = 1,
        **kwargs,
    ) -> None:
        """Configures training.

        Args:
            optimizer: "auto" for this package's AdamW, see `keras_t5gemma.optimizer`; or a name or a
                `keras.optimizers.Optimizer`. Weights in bfloat16 need an optimizer of this package.
            loss: "auto" for the loss of the problem; or any loss on logits.
            weighted_metrics: "auto" for the metric of the problem, or a list.
            accumulation_steps: number of parts in which a training step runs its batch.
            **kwargs: further arguments of `keras.Model.compile`, such as `metrics`.

        Raises:
            ValueError: if the loss takes probabilities, or `accumulation_steps` is not a positive integer or not
                available with the loss.
        """
        self._replaced_counts = None
        loss = self.auto_loss() if isinstance(loss, str) and loss == "auto" else loss
        if isinstance(weighted_metrics, str) and weighted_metrics == "auto":
            weighted_metrics = self.auto_metrics()
        check_reads_logits(loss)
        self.accumulation = Accumulation(accumulation_steps, loss)
        optimizer = resolve_optimizer(optimizer, self.dtype_policy, kwargs.get("auto_scale_loss", True))
        forget_compiled_metrics(self)
        keras.Model.compile(self, optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs)
        track_loss_in_float32(self)

    def is_quantizable(self, layer: keras.layers.Layer) -> bool:
        """Whether `quantize` may quantize a layer. The head stays in float32."""
        return layer is not self.head and super().is_quantizable(layer)

    def names_of(self, ids: np.ndarray) -> list:
        """Ids of classes as a list of the same shape: of names if the model has `labels`, else of integers."""
        if self.labels is None:
            return ids.tolist()
        return np.asarray(self.labels, object)[ids].tolist()

    def save_task_weights(self, filepath: str) -> None:
        """Saves the head's weights alone. keras-hub would add the optimizer's state of all weights."""
        with self._without_optimizer():
            super().save_task_weights(filepath)

    def load_task_weights(self, filepath: str) -> None:
        """Loads the head's weights, as `save_task_weights` saved them."""
        with self._without_optimizer():
            super().load_task_weights(filepath)

    @contextlib.contextmanager
    def _without_optimizer(self) -> Iterator[None]:
        optimizer = self.optimizer
        self.optimizer = None
        try:
            yield
        finally:
            self.optimizer = optimizer

    def get_config(self) -> dict:
        """The constructor's arguments, JSON-ready."""
        config = {
            **super().get_config(),
            "trainable": self.trainable,
            "num_classes": self.num_classes,
            "stack": self.stack,
            "dropout": self.dropout_rate,
            "labels": None if self.labels is None else list(self.labels),
        }
        return config if self.compiled else {**config, "compile": False}

    @classmethod
    def from_preset(cls, preset: str | Path | PresetFolder, load_weights: bool = True, **kwargs) -> Self:
        """Loads a classifier, or puts a new head on a T5Gemma.

        Args:
            preset: the folder of a classifier, of `save_to_preset` or in Hugging Face's format, whose head is read; or
                any T5Gemma that `T5GemmaEncoder.from_preset` takes, with `num_classes`. Of a plain T5Gemma,
                `stack="encoder"` reads only the encoder's tensors.
            load_weights: False for the architecture with random weights.
            **kwargs: arguments of the class, which replace saved ones; and `dtype`. With `num_classes` the head is
                new, as in keras-hub.

        Raises:
            ValueError: if the preset has no head and `num_classes` is not passed, or the preset is unknown.
            ConnectionError: if a download failed.
            CheckpointError: if the folder's tensors are not those of its config.
        """
        return classifier_from_preset(cls, preset, load_weights, kwargs)


def _check_vocabulary(backbone, preprocessor) -> None:
    """Refuses a tokenizer with more pieces than the backbone embeds. That of a saved model is read only later."""
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if tokenizer is not None and tokenizer.proto is not None:
        size, rows = tokenizer.vocabulary_size(), backbone.config.vocabulary_size
        if size > rows:
            raise ValueError(f"The tokenizer has {size} pieces, but the backbone embeds only vocabulary_size={rows}.")
