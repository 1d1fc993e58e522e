"""The task model: logits for training, text for a prompt."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import keras
import keras_hub

from keras_t5gemma._keras_internals import forget_compiled_metrics, track_loss_in_float32
from keras_t5gemma.checkpoints.keras_formats.presets import check_task
from keras_t5gemma.checkpoints.sources import open_t5gemma
from keras_t5gemma.hub import PREPROCESSOR_OPTIONS, PresetFolder
from keras_t5gemma.inference.buckets import Buckets
from keras_t5gemma.inference.decoding.loop import resolve_sampler
from keras_t5gemma.inference.decoding.programs import decoding_step
from keras_t5gemma.inference.embed import embed
from keras_t5gemma.inference.encode import encode
from keras_t5gemma.inference.generate import generate, generate_step
from keras_t5gemma.inference.programs.compiled import Programs
from keras_t5gemma.inference.programs.recorded_torch import recorded
from keras_t5gemma.inference.score import score, score_step
from keras_t5gemma.inference.stream import stream
from keras_t5gemma.layers.projection import VocabularyProjection
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.guarded import Guarded
from keras_t5gemma.models.quantization import QuantizationMixin
from keras_t5gemma.models.recompilation import RecompilationMixin
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.suggestions import check_keywords
from keras_t5gemma.text.preprocessor import KERAS_CONFIG_FILE as PREPROCESSOR_FILE
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer
from keras_t5gemma.training.batches.fitting import Fits
from keras_t5gemma.training.losses.answers import AnswerLoss, AnswerMeans
from keras_t5gemma.training.losses.checks import check_reads_logits
from keras_t5gemma.training.losses.cross_entropy import ChunkedLoss, VocabularyCrossEntropy
from keras_t5gemma.training.losses.distillation import Distillation
from keras_t5gemma.training.optimizers.factory import resolve_optimizer
from keras_t5gemma.training.steps.accumulation import Accumulation
from keras_t5gemma.training.steps.model import OwnSteps


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaSeq2SeqLM(OwnSteps, RecompilationMixin, Fits, Guarded, QuantizationMixin, keras_hub.models.Seq2SeqLM):
    """T5Gemma with its language-modelling head: `fit()` on pairs of texts, `generate()` from a prompt.

    Args:
        backbone: a `T5GemmaBackbone`.
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`, or None for token ids in and out.
        buckets: a `Buckets`: the shapes for which `generate`, `stream`, `score` and `embed` are compiled. The attribute
            may be changed later.
        **kwargs: `name`, `trainable`, and `compile=False` to leave the model uncompiled.

    Raises:
        TypeError: if a keyword is unknown.
        ValueError: if the tokenizer's vocabulary is larger than the backbone's.

    Example:
        >>> lm = kt.T5GemmaSeq2SeqLM.from_preset("t5gemma_2b_2b_prefixlm_it", dtype="bfloat16")
        >>> lm.generate("Why is the sky blue?", max_length=128)
        >>> lm.backbone.enable_lora(8)
        >>> lm.fit({"encoder_text": questions, "decoder_text": answers}, batch_size=4)
    """

    backbone_cls = T5GemmaBackbone
    preprocessor_cls = T5GemmaSeq2SeqLMPreprocessor
    presets = PRESETS

    # The methods of a trained model. They are plain functions in `inference`, so that each reads from top to bottom.
    generate = generate
    generate_step = generate_step
    decoding_step = decoding_step
    stream = stream
    score = score
    score_step = score_step
    embed = embed
    encode = encode

    def __init__(
        self,
        backbone: T5GemmaBackbone,
        preprocessor: T5GemmaSeq2SeqLMPreprocessor | None = None,
        *,
        buckets: Buckets | None = None,
        **kwargs,
    ):
        _check_keywords(kwargs)
        self.backbone = backbone
        self.buckets = Buckets() if buckets is None else buckets
        self.preprocessor = preprocessor
        config = backbone.config
        self._chunked = None
        # The tokenizer of a saved model reads its vocabulary only later.
        has_vocabulary = preprocessor is not None and preprocessor.tokenizer.proto is not None
        if has_vocabulary and preprocessor.tokenizer.vocabulary_size() > config.vocabulary_size:
            raise ValueError(
                f"The tokenizer has {preprocessor.tokenizer.vocabulary_size()} pieces, but the backbone embeds only "
                f"vocabulary_size={config.vocabulary_size}. Use the tokenizer the backbone was made for, or a backbone "
                f"with a larger `vocabulary_size`."
            )
        head = VocabularyProjection(
            backbone.decoder.token_embedding, config.final_logit_soft_cap, dtype=backbone.dtype_policy, name="logits"
        )
        inputs = backbone.input
        super().__init__(inputs=inputs, outputs=head(backbone(inputs)["decoder_sequence_output"]), **kwargs)
        self.head = head
        self.backbone = backbone  # again: above, PyTorch's module did not exist yet and would miss its parameters

    @property
    def buckets(self) -> Buckets:
        """The `Buckets` of `generate`, `stream`, `score`, `embed` and `encode`; others may be assigned at any time."""
        return self._buckets

    @buckets.setter
    def buckets(self, value: Buckets):
        if not isinstance(value, Buckets):
            raise ValueError(f"`buckets` must be a kt.Buckets. Received: {value!r}.")
        self._buckets = value

    @classmethod
    def from_preset(cls, preset: str | Path | PresetFolder, load_weights: bool = True, **kwargs) -> "T5GemmaSeq2SeqLM":
        """Loads the model of a preset, with its preprocessor.

        Args:
            preset: a built-in name (`keras-t5gemma presets` lists them), "hf://owner/name", "kaggle://...", or a folder
                in Keras or Hugging Face format.
            load_weights: False for the architecture with random weights.
            **kwargs: arguments of the class, such as `buckets`; `preprocessor`, None for a model without one; and
                `dtype`. If `dtype` is left out, it is Keras's policy (`keras.config.dtype_policy()`), whatever the
                dtype of the stored weights.

        Raises:
            TypeError: if a keyword is unknown.
            ValueError: if the preset is unknown, or is not a T5Gemma.
            ConnectionError: if a download failed.
            CheckpointError: if the folder's tensors are not those of its config.
        """
        _check_keywords(kwargs, ("dtype", "preprocessor", "buckets"))  # before anything is read
        folder = open_t5gemma(preset)
        check_task(folder, "T5GemmaSeq2SeqLM")
        backbone_kwargs = {name: kwargs.pop(name) for name in ("dtype",) if name in kwargs}
        backbone = cls.backbone_cls.from_preset(folder, load_weights=load_weights, **backbone_kwargs)
        if "preprocessor" not in kwargs:
            # The Keras preset of a model without preprocessor has no such file. Flax checkpoints contain only weights.
            has_one = folder.config is not None and (folder.is_hugging_face or (folder / PREPROCESSOR_FILE).is_file())
            kwargs["preprocessor"] = cls.preprocessor_cls.from_preset(folder) if has_one else None
        return cls(backbone, **kwargs)

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "auto",
        loss: str | keras.losses.Loss = "auto",
        *,
        weighted_metrics: str | Sequence | None = "auto",
        accumulation_steps: int = 1,
        sampler: str | keras_hub.samplers.Sampler = "greedy",
        **kwargs,
    ) -> None:
        """Configures training and generation.

        Args:
            optimizer: "auto" for this package's AdamW, with clipped gradients and a learning rate that depends on which
                weights are trained, see `keras_t5gemma.optimizer`; or a name or a `keras.optimizers.Optimizer`. Weights
                in bfloat16 need an optimizer of this package. Training raises an error if another optimizer would not
                change them.
            loss: "auto" for `VocabularyCrossEntropy()`, the mean over target tokens; a `VocabularyCrossEntropy` with
                other options; any `keras.losses.Loss` on logits; a `Distillation`; or a `PreferenceLoss`.
            weighted_metrics: "auto" for the accuracy of tokens, or a list. Custom metrics and losses on logits need the
                logits [B, T, V], which are not computed otherwise.
            accumulation_steps: number of parts in which a training step runs its batch, one after the other, with
                memory for the activations of one part. The step is that of the whole batch, including its mean over all
                target tokens. On several devices each part needs at least one row per device.
            sampler: "greedy", "beam", "top_k", "top_p", "random", "contrastive" or a `keras_hub.samplers.Sampler`. Beam
                search is this package's `BeamSampler`.
            **kwargs: further arguments of `keras.Model.compile`. With `jit_compile="auto"`, the default, TensorFlow
                compiles the decoding loops of models with ten million weights or more by XLA, on CPUs too.

        Raises:
            ValueError: if `sampler` is invalid, if the loss takes probabilities, if `accumulation_steps` is not a
                positive integer or not available with the loss, or if a teacher's vocabulary is not the model's.
        """
        sampler = resolve_sampler(sampler)
        self._replaced_counts = None
        loss = VocabularyCrossEntropy() if isinstance(loss, str) and loss == "auto" else loss
        check_reads_logits(loss)
        has_custom_metrics = weighted_metrics != "auto" or kwargs.get("metrics")
        self.accumulation = Accumulation(accumulation_steps, loss)
        self._chunked = None
        # The chunked loss supports only this reduction.
        is_mean = getattr(loss, "reduction", None) == "mean_with_sample_weight"
        if isinstance(loss, VocabularyCrossEntropy) and is_mean and not has_custom_metrics:
            weighted_metrics = None
            self._chunked = ChunkedLoss(loss)
        if isinstance(loss, AnswerLoss):
            if has_custom_metrics:
                raise ValueError(
                    f"`{type(loss).__name__}` makes no logits for metrics of your own: it reports its own. Leave out "
                    f"`metrics` and `weighted_metrics`."
                )
            weighted_metrics, self._chunked = None, AnswerMeans(loss)
        if isinstance(loss, Distillation):
            if self._chunked is None or self.head.is_quantized:
                raise ValueError(
                    "`Distillation` makes no logits for metrics of your own, has the mean over tokens for its only "
                    "`reduction`, and trains no model whose embedding is quantized. Leave these out."
                )
            tokenizer = None if self.preprocessor is None else self.preprocessor.tokenizer
            loss.check_student(self.backbone.config.vocabulary_size, tokenizer)
        optimizer = resolve_optimizer(optimizer, self.dtype_policy, kwargs.get("auto_scale_loss", True))
        self.jit_compile_is_auto = kwargs.get("jit_compile", "auto") == "auto"
        forget_compiled_metrics(self)
        super().compile(optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, sampler=sampler, **kwargs)
        # Discards programs that were compiled for another sampler or other options.
        self.programs = Programs()
        self.recorded_step = recorded(partial(decoding_step, self), self)
        track_loss_in_float32(self)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics that `fit` and `evaluate` report."""
        if self._chunked is None:
            return super().metrics
        # They replace Keras's mean of the losses, which weights batches by their rows.
        return self._chunked.metrics + [metric for metric in super().metrics if metric.name != "loss"]

    @property
    def keeps_own_loss(self) -> bool:
        """Whether loss and accuracy are means over tokens."""
        return self._chunked is not None

    def track_own_loss(self, loss) -> None:
        """Updates the mean of the losses over tokens with the result of `compute_loss`."""
        self._chunked.track(loss)

    @property
    def has_no_outputs(self) -> bool:
        """Whether the loss is of several answers per prompt, for which the model has no outputs."""
        return isinstance(self._chunked, AnswerMeans)

    @property
    def trains_without_logits(self) -> bool:
        """Whether steps never compute the logits [B, T, V]: the loss projects one chunk of hidden states at a time.

        A subclass that overrides `compute_loss` or `compute_metrics` gets logits, as Keras documents it.
        """
        if self.has_no_outputs:
            return True
        if self._chunked is None or self.head.is_quantized:
            return False
        own, given = T5GemmaSeq2SeqLM, type(self)
        is_overridden = (given.compute_loss, given.compute_metrics) != (own.compute_loss, own.compute_metrics)
        return not is_overridden or isinstance(self._chunked.loss, Distillation)  # whose logits are made in chunks only

    def hidden_states(self, inputs, training=None):
        """The decoder's last hidden states, which `head` projects to logits.

        Args:
            inputs: the four inputs of `T5GemmaBackbone`, a dict.
            training: whether dropout is on.

        Returns:
            [B, T, D].
        """
        return self.backbone(inputs, training=training)["decoder_sequence_output"]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of a step. The chunked loss also updates its accuracy.

        Args:
            x: the model's four inputs, a dict.
            y: labels [B, T], or other targets of the loss.
            y_pred: logits [B, T, V]; or None, if the loss is `VocabularyCrossEntropy`, `Distillation` or
                `PreferenceLoss`, to run the model on x without making them. An override that needs no logits passes on
                None.
            sample_weight: [B] or [B, T], or None.
            training: whether gradients will be computed.

        Returns:
            A float32 scalar.
        """
        if self.has_no_outputs:
            return self._chunked.of_batch(self, x, y, sample_weight, training, more=lambda: sum(self.losses))
        if y_pred is None:
            hidden = self.hidden_states(x, training=training)
            return self._chunked(self.head, hidden, y, sample_weight, training, more=sum(self.losses))
        # Reached with a quantized embedding. Keras also calls this once symbolically before the first step.
        y = self._chunked.loss.labels_of(y, y_pred.shape[-1]) if self._chunked else y
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if self._chunked:
            self._chunked.update_from_logits(y_pred, y, sample_weight)
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """The results of the metrics as a dict. After a step without logits they are up to date already.

        Args:
            x: the model's four inputs, a dict.
            y: labels [B, T], or other targets of the loss.
            y_pred: logits [B, T, V]; None if the model `trains_without_logits`.
            sample_weight: [B] or [B, T], or None.

        Returns:
            `{name: value}`.
        """
        if y_pred is None:
            return self.get_metrics_result()
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def get_config(self) -> dict:
        """The constructor's arguments, JSON-ready."""
        config = {**super().get_config(), "buckets": keras.saving.serialize_keras_object(self.buckets)}
        return config if self.compiled else {**config, "compile": False}

    @classmethod
    def from_config(cls, config: Mapping) -> "T5GemmaSeq2SeqLM":
        """Creates a model from the result of `get_config`, with new weights."""
        buckets = keras.saving.deserialize_keras_object(config.get("buckets"))
        return super().from_config({**config, "buckets": buckets})

    def get_compile_config(self) -> dict | None:
        """The arguments of `compile`, including the sampler, JSON-ready; None if the model is not compiled."""
        if not self.compiled:
            return None
        return {
            **super().get_compile_config(),
            # Keras received None for it, because the chunked loss has its own metrics.
            **({"weighted_metrics": "auto"} if self._chunked else {}),
            # Keras stores the value it chose for "auto" on this machine. Decoding loops need "auto" itself; see
            # `by_xla`.
            **({"jit_compile": "auto"} if self.jit_compile_is_auto else {}),
            "sampler": keras.saving.serialize_keras_object(self.sampler),
        }


def _check_keywords(kwargs: Mapping, more: Sequence[str] = ()) -> None:
    """Raises an error for keywords that Keras would silently accept.

    Args:
        kwargs: the keyword arguments.
        more: valid names in addition to the constructor's.

    Raises:
        TypeError: if a keyword is unknown. For an option of the preprocessor, the message says where it belongs.
    """
    misplaced = sorted(set(kwargs) & set(PREPROCESSOR_OPTIONS) - set(more))
    hint = ""
    if misplaced:
        hint = f" It is the preprocessor's: pass `preprocessor=T5GemmaSeq2SeqLMPreprocessor(..., {misplaced[0]}=...)`."
    check_keywords(T5GemmaSeq2SeqLM, misplaced or kwargs, (*more, "name", "trainable", "compile"), hint)


# keras-hub finds the tokenizer and preprocessor of a backbone by this attribute. Their modules have a lower rank and
# cannot import the backbone.
T5GemmaTokenizer.backbone_cls = T5GemmaBackbone
T5GemmaSeq2SeqLMPreprocessor.backbone_cls = T5GemmaBackbone
