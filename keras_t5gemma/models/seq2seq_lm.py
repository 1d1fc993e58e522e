"""The task model: logits for training, text for a prompt."""

from functools import partial

import keras
import keras_hub

from keras_t5gemma._keras_internals import track_loss_in_float32
from keras_t5gemma.checkpoints.sources import open_t5gemma
from keras_t5gemma.hub import PREPROCESSOR_OPTIONS
from keras_t5gemma.inference.buckets import Buckets
from keras_t5gemma.inference.decoding.loop import resolve_sampler
from keras_t5gemma.inference.embed import embed
from keras_t5gemma.inference.generate import decoding_step, generate, generate_step
from keras_t5gemma.inference.programs.compiled import Programs
from keras_t5gemma.inference.programs.recorded_torch import recorded
from keras_t5gemma.inference.score import score, score_step
from keras_t5gemma.inference.stream import stream
from keras_t5gemma.layers.projection import VocabularyProjection
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.guarded import Guarded
from keras_t5gemma.models.quantization import Quantizes, quantize
from keras_t5gemma.models.recompilation import Recompiles
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.text.preprocessor import KERAS_CONFIG_FILE as PREPROCESSOR_FILE
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer
from keras_t5gemma.training.batches.fitting import Fits
from keras_t5gemma.training.losses.cross_entropy import ChunkedLoss, VocabularyCrossEntropy
from keras_t5gemma.training.losses.distillation import Distillation
from keras_t5gemma.training.optimizers.checks import check_optimizer
from keras_t5gemma.training.optimizers.factory import optimizer as default_optimizer
from keras_t5gemma.training.steps.accumulation import Accumulation
from keras_t5gemma.training.steps.model import OwnSteps


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaSeq2SeqLM(OwnSteps, Recompiles, Fits, Guarded, Quantizes, keras_hub.models.Seq2SeqLM):
    """T5Gemma with its language-modelling head: `fit()` on pairs of texts, `generate()` from a prompt.

    Args:
        backbone: a `T5GemmaBackbone`.
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`, or None for token ids in and out.
        buckets: a `Buckets`, the shapes that `generate` and the like are compiled for; the attribute may be changed.
        **kwargs: `name`, `trainable`, and `compile=False` to leave the model uncompiled.

    Raises:
        TypeError: for another keyword.
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

    # What a trained model is asked. As functions they read from top to bottom, see `inference`.
    generate = generate
    generate_step = generate_step
    decoding_step = decoding_step
    stream = stream
    score = score
    score_step = score_step
    embed = embed

    def __init__(self, backbone, preprocessor=None, *, buckets=None, **kwargs):
        _check_keywords(kwargs)
        self.backbone = backbone
        self.buckets = Buckets() if buckets is None else buckets
        self.preprocessor = preprocessor
        config = backbone.config
        self._chunked = None
        # A saved model's tokenizer reads its vocabulary only after this.
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
        self.backbone = backbone  # again: PyTorch's module did not exist yet above, and would miss its parameters

    @property
    def buckets(self):
        """The `Buckets` of `generate`, `stream`, `score` and `embed`; others may be assigned at any time."""
        return self._buckets

    @buckets.setter
    def buckets(self, value):
        if not isinstance(value, Buckets):
            raise ValueError(f"`buckets` must be a kt.Buckets. Received: {value!r}.")
        self._buckets = value

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """The model of a preset, with its preprocessor.

        Args:
            preset: a built-in name (`keras-t5gemma presets` lists them), "hf://owner/name", "kaggle://...", or a folder
                in Keras or Hugging Face format.
            load_weights: False for the architecture with random weights.
            **kwargs: `dtype`, Keras's policy (`keras.config.dtype_policy()`) if left out, whatever the weights are
                stored in; `preprocessor`, None to do without; or what the class takes, such as `buckets`.

        Raises:
            TypeError: for an unknown keyword.
            ValueError: if the preset is unknown, or is no T5Gemma.
            ConnectionError: if a download failed.
            CheckpointError: if the folder's tensors are not those of its config.
        """
        _check_keywords(kwargs, ("dtype", "preprocessor", "buckets"))  # before anything is read
        folder = open_t5gemma(preset)
        backbone_kwargs = {name: kwargs.pop(name) for name in ("dtype",) if name in kwargs}
        backbone = cls.backbone_cls.from_preset(folder, load_weights=load_weights, **backbone_kwargs)
        if "preprocessor" not in kwargs:
            # A Keras preset of a model without preprocessor has none; Flax's checkpoints hold parameters only.
            has_one = folder.config is not None and (folder.is_hugging_face or (folder / PREPROCESSOR_FILE).is_file())
            kwargs["preprocessor"] = cls.preprocessor_cls.from_preset(folder) if has_one else None
        return cls(backbone, **kwargs)

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        weighted_metrics="auto",
        accumulation_steps=1,
        sampler="greedy",
        **kwargs,
    ):
        """Configures training and generation.

        Args:
            optimizer: "auto" for this package's AdamW, with gradients clipped and a learning rate for what is trained,
                see `keras_t5gemma.optimizer`; a name or a `keras.optimizers.Optimizer`. Weights in bfloat16 take one
                of this package's; another one that would not move them is an error when training begins.
            loss: "auto" for `VocabularyCrossEntropy()`, the mean over target tokens; one with options of your own; or
                any `keras.losses.Loss` on logits; or a `Distillation`.
            weighted_metrics: "auto" for the accuracy of tokens, or a list. Metrics of your own and losses on logits
                need the logits [B, T, V], which are not made otherwise.
            accumulation_steps: parts that a training step runs its batch in, one after the other, with memory for the
                activations of one; the step is that of the whole batch, its mean over all target tokens included. On
                several devices a part needs a row or more for each.
            sampler: "greedy", "beam", "top_k", "top_p", "random", "contrastive" or a `keras_hub.samplers.Sampler`. Beam
                search is this package's `BeamSampler`.
            **kwargs: what `keras.Model.compile` takes besides. With `jit_compile="auto"`, its default, TensorFlow has
                XLA compile the decoding loops of models of ten million weights and more, on CPUs too.

        Raises:
            ValueError: if `sampler` is invalid, `accumulation_steps` is not a positive integer or not available
                with the loss, or a teacher's vocabulary not the model's.
        """
        sampler = resolve_sampler(sampler)
        self._replaced = None
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = default_optimizer(warmup_steps=0)
        loss = VocabularyCrossEntropy() if isinstance(loss, str) and loss == "auto" else loss
        own_metrics = weighted_metrics != "auto" or kwargs.get("metrics")
        self.accumulation = Accumulation(accumulation_steps, loss)
        self._chunked = None
        is_mean = getattr(loss, "reduction", None) == "mean_with_sample_weight"  # the chunked loss knows no other
        if isinstance(loss, VocabularyCrossEntropy) and is_mean and not own_metrics:
            weighted_metrics = None
            self._chunked = ChunkedLoss(loss)
        if isinstance(loss, Distillation):
            if self._chunked is None or self.head.is_quantized:
                raise ValueError(
                    "`Distillation` makes no logits for metrics of your own, has the mean over tokens for its only "
                    "`reduction`, and trains no model whose embedding is quantized. Leave these out."
                )
            tokenizer = None if self.preprocessor is None else self.preprocessor.tokenizer
            loss.check_student(self.backbone.config.vocabulary_size, tokenizer)
        if self.dtype_policy.name == "float16" and optimizer is not None and kwargs.get("auto_scale_loss", True):
            # LoRA on float16 weights: the way back is float16's. Keras scales the loss of "mixed_float16" alone.
            optimizer = keras.optimizers.get(optimizer)
            if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        self.jit_compile_is_auto = kwargs.get("jit_compile", "auto") == "auto"
        super().compile(optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, sampler=sampler, **kwargs)
        # What was compiled for another sampler, or other options, goes.
        self.programs = Programs()
        self.recorded_step = recorded(partial(decoding_step, self), self)
        track_loss_in_float32(self)

    def make_train_function(self, force=False):
        """Keras's own, once it is certain that the optimizer can train the weights.

        Not in `compile`, after which LoRA may still freeze the weights in question.

        Raises:
            ValueError: if it can not, see `check_optimizer`.
        """
        if self.train_function is None or force:
            check_optimizer(self.optimizer, self.trainable_variables)
        return super().make_train_function(force)

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """As `T5GemmaBackbone.quantize`."""
        quantize(self, super().quantize, mode, config, filters, **kwargs)

    @property
    def metrics(self):
        """The metrics `fit` and `evaluate` report."""
        if self._chunked is None:
            return super().metrics
        # In place of Keras's own mean of the losses, which weighs batches by their rows.
        return self._chunked.metrics + [metric for metric in super().metrics if metric.name != "loss"]

    @property
    def keeps_own_loss(self):
        """Whether loss and accuracy are means over tokens, kept as the loss is computed."""
        return self._chunked is not None

    @property
    def trains_without_logits(self):
        """Whether steps make no logits [B, T, V]: the loss projects hidden states a chunk at a time."""
        return self._chunked is not None and not self.head.is_quantized

    def hidden_states(self, inputs, training=None):
        """The decoder's last hidden states [B, T, D], which `head` projects to logits.

        Args:
            inputs: the model's four.
            training: whether dropout is on.
        """
        return self.backbone(inputs, training=training)["decoder_sequence_output"]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of a step. The chunked one updates its means of loss and accuracy, which only it knows.

        Args:
            x: the model's four inputs.
            y: labels [B, T], or what else the loss takes.
            y_pred: logits [B, T, V]; or None if the model `trains_without_logits`.
            sample_weight: [B] or [B, T], or None.
            training: whether gradients will be asked for.
        """
        if y_pred is None:
            hidden = self.hidden_states(x, training=training)
            return self._chunked(self.head, hidden, y, sample_weight, training, more=sum(self.losses))
        # Of a quantized embedding; and before the first step Keras comes here once, symbolically.
        y = self._chunked.loss.labels_of(y, y_pred.shape[-1]) if self._chunked else y
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if self._chunked:
            self._chunked.update_from_logits(loss, y_pred, y, sample_weight)
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """The metrics' results; those of a step without logits are up to date."""
        if y_pred is None:
            return self.get_metrics_result()
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def get_config(self):
        """The constructor's arguments."""
        config = {**super().get_config(), "buckets": keras.saving.serialize_keras_object(self.buckets)}
        return config if self.compiled else {**config, "compile": False}

    @classmethod
    def from_config(cls, config):
        """The inverse of `get_config`."""
        buckets = keras.saving.deserialize_keras_object(config.get("buckets"))
        return super().from_config({**config, "buckets": buckets})

    def get_compile_config(self):
        """What `compile` was called with, the sampler included, JSON-ready; None if it was not called."""
        if not self.compiled:
            return None
        return {
            **super().get_compile_config(),
            # Given as None to Keras, which has nothing to do with it.
            **({"weighted_metrics": "auto"} if self._chunked else {}),
            # Keras keeps what it made of "auto" on this machine, and decoding loops ask whether it was, see `by_xla`.
            **({"jit_compile": "auto"} if self.jit_compile_is_auto else {}),
            "accumulation_steps": self.accumulation.steps,
            "sampler": keras.saving.serialize_keras_object(self.sampler),
        }

    def compile_from_config(self, config):
        """Compiles as `get_compile_config` says, and makes the optimizer's variables for a saved state, if any."""
        config = {name: keras.saving.deserialize_keras_object(value) for name, value in config.items()}
        is_built = config.pop("optimizer_is_built", True)
        self.compile(**config)
        if is_built:
            self.optimizer.build(self.trainable_variables)


def _check_keywords(kwargs, more=()):
    """Refuses keywords that Keras would take without a word.

    Args:
        kwargs: a dict.
        more: names that are known besides the constructor's.

    Raises:
        TypeError: if one is unknown; the message says where a preprocessor's belong.
    """
    unknown = sorted(set(kwargs) - {"name", "trainable", "compile", *more})
    if not unknown:
        return
    hint = f" Known are {', '.join([*more, 'name', 'trainable', 'compile'])}."
    if unknown[0] in PREPROCESSOR_OPTIONS:
        hint = f" It is the preprocessor's: pass `preprocessor=T5GemmaSeq2SeqLMPreprocessor(..., {unknown[0]}=...)`."
    raise TypeError(f"T5GemmaSeq2SeqLM got an unexpected keyword argument {unknown[0]!r}.{hint}")


# keras-hub finds a backbone's tokenizer and preprocessor by this; their modules rank below and cannot name it.
T5GemmaTokenizer.backbone_cls = T5GemmaBackbone
T5GemmaSeq2SeqLMPreprocessor.backbone_cls = T5GemmaBackbone
