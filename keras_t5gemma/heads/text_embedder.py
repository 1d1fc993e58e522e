"""`T5GemmaTextEmbedder`: texts as vectors, trained on pairs of queries and documents."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_t5gemma.checkpoints.hugging_face.modules import OPTIONS, options_of
from keras_t5gemma.checkpoints.keras_formats.embedder_options import embedder_options
from keras_t5gemma.checkpoints.sources import open_t5gemma
from keras_t5gemma.checks import arguments_named, integer
from keras_t5gemma.config import PAD_ID
from keras_t5gemma.hub import PresetFolder
from keras_t5gemma.inference.buckets import Buckets
from keras_t5gemma.inference.embed import encoder_rows, vectors_of
from keras_t5gemma.inference.programs.compiled import Program, Programs
from keras_t5gemma.kernels.device import devices_of_a_batch, replicas
from keras_t5gemma.layers.pooling import Pooling
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.encoder import T5GemmaEncoder
from keras_t5gemma.models.guarded import Guarded
from keras_t5gemma.models.quantization import QuantizationMixin
from keras_t5gemma.models.recompilation import RecompilationMixin
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.suggestions import check_keywords
from keras_t5gemma.text.cuts import cuts_reported
from keras_t5gemma.text.preprocessor import KERAS_CONFIG_FILE as PREPROCESSOR_FILE
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.training.batches.fitting import Fits
from keras_t5gemma.training.batches.pairs import PairArrays, column_names, columns_of, is_converted, pair_source
from keras_t5gemma.training.losses.in_batch_negatives import ContrastMeans, InBatchNegatives
from keras_t5gemma.training.optimizers.factory import resolve_optimizer
from keras_t5gemma.training.steps.accumulation import Accumulation
from keras_t5gemma.training.steps.comparison import GRADIENTS
from keras_t5gemma.training.steps.model import OwnSteps


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaTextEmbedder(OwnSteps, RecompilationMixin, Fits, Guarded, QuantizationMixin, keras_hub.models.Task):
    """The encoder with pooling: `embed()` makes texts vectors, `fit()` trains them on pairs of texts.

    Called on a dict of `token_ids` and `padding_mask`, int32 [B, S], the model returns float32 [B, E].

    Args:
        backbone: a `T5GemmaEncoder`; or a `T5GemmaBackbone`, whose encoder is used, with the same variables.
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`, or None for token ids. Texts are read as its prompts are.
        pooling: "mean" of all tokens, or "last" for the last token.
        normalize: whether vectors have length 1, so that products are cosines.
        dimensions: the first numbers of a vector that are kept, E; all of them if None. A model that was trained with
            `InBatchNegatives(matryoshka=...)` loses little.
        **kwargs: `name`, `trainable`, and `compile=False` to leave the model uncompiled.

    Attributes:
        buckets: the `Buckets` for which `embed` is compiled. Others may be assigned. They are not saved.

    Raises:
        TypeError: if a keyword is unknown.
        ValueError: if an argument is invalid.

    Example:
        >>> embedder = kt.T5GemmaTextEmbedder.from_preset("t5gemma_2b_2b_ul2", dtype="bfloat16")
        >>> embedder.fit({"query": questions, "document": answers}, batch_size=64)
        >>> scores = embedder.embed(questions) @ embedder.embed(answers).T
    """

    backbone_cls = T5GemmaEncoder
    preprocessor_cls = T5GemmaSeq2SeqLMPreprocessor
    presets = PRESETS

    batch_source = staticmethod(pair_source)
    compares_rows = True
    trains_without_logits = True
    keeps_own_loss = True

    def __init__(
        self,
        backbone: T5GemmaEncoder | T5GemmaBackbone,
        preprocessor: T5GemmaSeq2SeqLMPreprocessor | None = None,
        *,
        pooling: str = "mean",
        normalize: bool = True,
        dimensions: int | None = None,
        **kwargs,
    ):
        _check_keywords(kwargs)
        if isinstance(backbone, T5GemmaBackbone):
            backbone = T5GemmaEncoder.from_backbone(backbone)
        if not isinstance(backbone, T5GemmaEncoder):
            raise ValueError(f"`backbone` must be a T5GemmaEncoder or a T5GemmaBackbone. Received: {backbone!r}.")
        if preprocessor is not None and not isinstance(preprocessor, T5GemmaSeq2SeqLMPreprocessor):
            raise ValueError(
                f"`preprocessor` must be a T5GemmaSeq2SeqLMPreprocessor, or None. Received: {preprocessor!r}."
            )
        if not isinstance(normalize, bool):
            raise ValueError(f"`normalize` must be True or False. Received: normalize={normalize!r}.")
        width = backbone.config.encoder.hidden_dim
        dimensions = integer(width if dimensions is None else dimensions, "dimensions")
        if dimensions > width:
            raise ValueError(f"`dimensions` must be at most the encoder's width, {width}. Received: {dimensions}.")
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.pooling, self.normalize, self.dimensions = pooling, normalize, dimensions
        self.programs = Programs()
        self.buckets = Buckets()
        inputs = backbone.input
        pool = Pooling(pooling, normalize, dimensions, name="pooling")
        super().__init__(inputs=inputs, outputs=pool(backbone(inputs), inputs["padding_mask"]), **kwargs)
        self.backbone = backbone  # again: above, PyTorch's module did not exist yet and would miss its parameters

    def __call__(self, inputs, *args, **kwargs):
        """The vectors [B, E] of texts; or those of a batch of pairs, on which Keras builds a model before training."""
        if is_converted(inputs):
            return self.outputs_of(inputs, *args, **kwargs)
        return super().__call__(inputs, *args, **kwargs)

    @classmethod
    def from_preset(
        cls, preset: str | Path | PresetFolder, load_weights: bool = True, **kwargs
    ) -> "T5GemmaTextEmbedder":
        """Loads the embedder of a preset, or makes one from the encoder of any T5Gemma.

        Args:
            preset: a name or folder as for `T5GemmaEncoder.from_preset`; or a folder of sentence-transformers, whose
                pooling and normalization are read too.
            load_weights: False for the architecture with random weights.
            **kwargs: arguments of the class, which replace saved ones; `preprocessor`, None for a model without one;
                and `dtype`, as for `T5GemmaSeq2SeqLM.from_preset`.

        Raises:
            TypeError: if a keyword is unknown.
            ValueError: if the preset is unknown, or is not a T5Gemma.
            ConnectionError: if a download failed.
            CheckpointError: if the folder's tensors are not those of its config, or it has other modules.
        """
        _check_keywords(kwargs, ("dtype", "preprocessor", *OPTIONS))  # before anything is read
        folder = open_t5gemma(preset)
        options = {**embedder_options(folder), **kwargs}
        encoder_kwargs = {name: options.pop(name) for name in ("dtype",) if name in options}
        encoder = cls.backbone_cls.from_preset(folder, load_weights=load_weights, **encoder_kwargs)
        if "preprocessor" not in options:
            has_one = folder.config is not None and (folder.is_hugging_face or (folder / PREPROCESSOR_FILE).is_file())
            options["preprocessor"] = cls.preprocessor_cls.from_preset(folder) if has_one else None
        return cls(encoder, **options)

    def embed(self, inputs, *, batch_size: int = 32, truncate: str | None = None, progress: bool = False) -> np.ndarray:
        """The vector of each text. It depends neither on the other texts nor on `batch_size`.

        Args:
            inputs: a text or a list of texts; without a preprocessor as for `T5GemmaSeq2SeqLM.embed`.
            batch_size: the maximum number of texts per batch.
            truncate: "left" or "right" to cut texts that are too long; None for the preprocessor's own setting.
            progress: whether to show a progress bar.

        Returns:
            float32 [N, E], in the order of the inputs; without N for a single text.

        Raises:
            ValueError, MemoryError, RuntimeError: as for `T5GemmaSeq2SeqLM.embed`.
        """
        program = self.programs.get(("embed",), lambda: Program(partial(_vectors, self), self))
        batch_size = integer(batch_size, "batch_size")
        with cuts_reported(), arguments_named({"encoder_text": "inputs"}):
            rows, batched = encoder_rows(self, inputs, truncate)
        vectors = vectors_of(self, rows, program, self.dimensions, batch_size=batch_size, progress=progress)
        return vectors if batched else vectors[0]

    def predict(self, x, batch_size: int | None = None) -> np.ndarray:
        """The vectors of texts, as `embed` returns them."""
        return self.embed(x, batch_size=32 if batch_size is None else batch_size)

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "auto",
        loss: str | InBatchNegatives = "auto",
        *,
        accumulation_steps: int = 1,
        **kwargs,
    ) -> None:
        """Configures training.

        Args:
            optimizer: as for `T5GemmaSeq2SeqLM.compile`.
            loss: "auto" for `InBatchNegatives()`, or one with other options.
            accumulation_steps: number of parts in which a training step encodes its batch, one after the other, with
                memory for the activations of one part. All texts of the batch are still each other's negatives, and the
                gradient is that of the whole batch (arXiv 2101.06983). Each part is encoded twice.
            **kwargs: further arguments of `keras.Model.compile`, but no metrics: loss and accuracy are reported.

        Raises:
            ValueError: if an argument is invalid, or `matryoshka` has a width above the embedder's.
        """
        loss = InBatchNegatives() if isinstance(loss, str) and loss == "auto" else loss
        if not isinstance(loss, InBatchNegatives) or loss.reduction == "none":
            raise ValueError(f"`loss` must be an InBatchNegatives that sums or averages. Received: loss={loss!r}.")
        loss.check_width(self.dimensions)
        for name in ("metrics", "weighted_metrics", "loss_weights"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` must be left out. Received: {name}={kwargs[name]!r}.")
        optimizer = resolve_optimizer(optimizer, self.dtype_policy, kwargs.get("auto_scale_loss", True))
        self._replaced_counts = None
        self.accumulation = Accumulation(accumulation_steps, loss)
        # Keras gets no loss: it would call the model on a batch of pairs.
        super().compile(optimizer=optimizer, loss=None, **kwargs)
        self.loss = loss
        self._means = ContrastMeans(loss)
        self.programs = Programs()

    def fit(
        self,
        x=None,
        y: None = None,
        batch_size: int | None = None,
        sample_weight=None,
        validation_data=None,
        validation_split: float = 0.0,
        **kwargs,
    ) -> keras.callbacks.History:
        """Trains on pairs, as `keras.Model.fit` does. Each batch's documents are negatives of its other queries.

        Args:
            x: in memory, `{"query": [...], "document": [...]}` of B texts each and, for hard negatives, "negative" or
                "negative_1", "negative_2", ...; or a tuple of these columns; or a `datasets.Dataset` with such columns.
                Or batches of any of these: a Grain dataset, a `tf.data.Dataset`, a `keras.utils.PyDataset`, a
                `torch.utils.data.DataLoader`, a generator. Without a preprocessor rows of token ids, whose `<pad>` is
                left out. Columns of a batch are padded to their longest text, rounded up to 16, 32, 64, ... tokens.
            y: must be None.
            batch_size: pairs per step, for pairs in memory; 32 if None.
            sample_weight: [B], one per pair. Documents of weight 0 are negatives all the same.
            validation_data: as x.
            validation_split: the fraction of pairs in memory, taken from the end, to validate on instead.
            **kwargs: further arguments of `T5GemmaSeq2SeqLM.fit`, such as `epochs`.

        Returns:
            A `keras.callbacks.History` with loss and accuracy: the share of queries that find their document first.

        Raises:
            ValueError: if the data have another form or never end, or the model is not compiled.
        """
        if validation_data is not None:
            validation_data = _in_columns(validation_data)
        return super().fit(_in_columns(x), y, batch_size, sample_weight, validation_data, validation_split, **kwargs)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics that `fit` and `evaluate` report: the means of the loss and of the accuracy over all pairs."""
        return self._means.metrics if self.compiled else []

    def track_own_loss(self, loss) -> None:
        """Updates the mean of the losses over pairs with the result of `compute_loss`."""
        self._means.track(loss)

    def outputs_of(self, x: Mapping, training: bool | None = None):
        """The vectors of a batch of pairs.

        Args:
            x: columns as `fit` converts them: `{"query": {"token_ids": [B, S], "padding_mask": [B, S]}, ...}`.
            training: whether dropout is on.

        Returns:
            float32 [B, C, E]: queries, documents, hard negatives.
        """
        return ops.stack([self(x[name], training=training) for name in column_names(x)], axis=1)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of a step. It also updates the accuracy.

        Args:
            x: a batch of pairs, as for `outputs_of`.
            y: [B, C], numbers of texts as for `InBatchNegatives`; or `{GRADIENTS: [B, C, E]}`, see
                `training.steps.accumulation`.
            y_pred: vectors [B, C, E]; or None, to run the model on x.
            sample_weight: [B] or None.
            training: whether gradients will be computed.

        Returns:
            A float32 scalar.
        """
        vectors = self.outputs_of(x, training) if y_pred is None else y_pred
        more = sum(self.losses) / replicas()
        if isinstance(y, Mapping):
            self._means.skip()
            return ops.sum(vectors * y[GRADIENTS]) + more
        return self._means(y, vectors, sample_weight) / replicas() + more

    def compute_metrics(self, x, y, y_pred, sample_weight=None):  # noqa: ARG002 Keras's arguments
        """The results of the metrics as a dict. `compute_loss` has updated them already."""
        return self.get_metrics_result()

    def pair_arrays(self, for_devices: bool = False) -> PairArrays:
        """The function that converts a batch of pairs to the model's arrays.

        Args:
            for_devices: whether to fill the rows up to a multiple of the devices along the batch.
        """
        limit = None if self.preprocessor is None else self.preprocessor.encoder_sequence_length
        return PairArrays(partial(_rows, self), limit, devices_of_a_batch()[1] if for_devices else 1)

    _to_arrays = pair_arrays  # as `Fits` calls it

    def get_config(self) -> dict:
        """The constructor's arguments, JSON-ready."""
        config = {**super().get_config(), **(options_of(self) or {})}
        return config if self.compiled else {**config, "compile": False}

    def get_compile_config(self) -> dict | None:
        """The arguments of `compile`, JSON-ready; None if the model is not compiled."""
        if not self.compiled:
            return None
        return {
            **super().get_compile_config(),
            "loss": keras.saving.serialize_keras_object(self.loss),
        }


def _vectors(embedder, inputs):
    """A batch's vectors [B, E]."""
    ids, mask = inputs["encoder_token_ids"], inputs["encoder_padding_mask"]
    return embedder({"token_ids": ids, "padding_mask": mask}, training=False)


def _rows(embedder, texts: list, name: str) -> list:
    """A column's texts, or rows of ids without `<pad>`, as checked rows of ids."""
    if embedder.preprocessor is None:
        texts = [row if isinstance(row, str) else [token for token in row if token != PAD_ID] for row in texts]
    with arguments_named(dict.fromkeys(("encoder_text", "encoder_token_ids", "inputs"), name)):
        rows, _ = encoder_rows(embedder, texts)
    return rows


def _in_columns(x):
    """A tuple of columns as a dict of columns; other data unchanged."""
    return columns_of(x) if isinstance(x, tuple) and x and not isinstance(x[0], Mapping) else x


def _check_keywords(kwargs: Mapping, more: Sequence[str] = ()) -> None:
    """Raises a TypeError for keywords that Keras would silently accept."""
    check_keywords(T5GemmaTextEmbedder, kwargs, (*more, "name", "trainable", "compile"))
