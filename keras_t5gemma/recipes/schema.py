"""Every key of a training recipe, with its type, its range and its meaning. Needs no Keras."""

import dataclasses
from typing import Any, cast

from keras_t5gemma.evaluation.text_metrics import NAMES as METRICS

# The kinds of `PreferenceLoss`, whose module needs Keras; the first ones have a reference.
PREFERENCES_WITH_REFERENCE = ("dpo", "ipo", "hinge", "robust", "apo_zero", "kto")
PREFERENCE_LOSSES = (*PREFERENCES_WITH_REFERENCE, "simpo", "cpo", "orpo")
DTYPES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")


def _key(default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A field with limits: `least`, `above`, `most` and `choices` of a value, `least_items`, `most_items` of a list."""
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """`[model]`: the model to train. It needs `preset` or `adapt`.

    Attributes:
        preset: a T5Gemma to continue with: a built-in name, hf://owner/name, kaggle://... or a folder.
        adapt: one Gemma 2, or an encoder and a decoder, to adapt to a T5Gemma, as for `keras-t5gemma adapt`.
        tokenizer: with `adapt`, the preset or folder of the tokenizer; the last Gemma 2 if left out.
        cross_attention: with `adapt`, its initial weights; auto: random only if the two Gemma 2 differ.
        encoder_attention: with `adapt`, "causal" is an ablation.
        encoder_heads: with `adapt`, "multi" is an ablation.
        dtype: dtype policy of weights and computation, as in Keras; "mixed_bfloat16" keeps weights in float32.
        lora_rank: 0 to train every weight, else the rank of LoRA's factors; only these are then trained and written.
        rematerialize: whether the backward pass computes activations again, which saves memory.
    """

    preset: str | None = None
    adapt: tuple[str, ...] = _key((), most_items=2)
    tokenizer: str | None = None
    cross_attention: str = _key("auto", choices=("auto", "self-attention", "random"))
    encoder_attention: str = _key("bidirectional", choices=("bidirectional", "causal"))
    encoder_heads: str = _key("grouped", choices=("grouped", "multi"))
    dtype: str = _key("float32", choices=DTYPES)
    lora_rank: int = _key(0, least=0)
    rematerialize: bool = False


@dataclasses.dataclass(frozen=True)
class DataSection:
    """`[data]`: the texts, see `text_source` and `pretraining_dataset`.

    Attributes:
        sources: files or patterns, relative to the working directory of the command, all of one format.
        weights: a number per source, to mix them: 3 and 1 for three texts of the first to one of the second. Each
            begins again when it has been read. Left out, all texts are read equally often.
        validation: files or patterns of held-out texts to evaluate on; empty for no evaluation.
        format: format of `sources` and `validation`; inferred from the files' names if left out.
        field: the field or column that holds the text.
        sample_by: the unit of a text file that is one document.
        documents: "joined" to one stream, or "whole" for examples of single texts.
        pack: whether several examples share a row.
        num_workers: processes that read and tokenize; their number does not change the data.
        shuffle_buffer: number of texts that are shuffled together if the source has no random access.
        pack_buffer: number of examples that are packed together.
        pair_fields: for the objective "supervised" and [evaluation] prompts, the names of input and target.
        answers: for the objective "supervised" and [evaluation] prompts, which answers of a chat count.
    """

    sources: tuple[str, ...] = _key(least_items=1)
    weights: tuple[float, ...] = _key((), above=0)
    validation: tuple[str, ...] = ()
    format: str | None = _key(None, choices=("text", "jsonl", "parquet", "array_record"))
    field: str = "text"
    sample_by: str = _key("line", choices=("line", "paragraph", "document"))
    documents: str = _key("joined", choices=("joined", "whole"))
    pack: bool = False
    num_workers: int = _key(0, least=0)
    shuffle_buffer: int = _key(10_000, least=1)
    pack_buffer: int = _key(1_024, least=1)
    pair_fields: tuple[str, ...] = _key(("encoder_text", "decoder_text"), least_items=2, most_items=2)
    answers: str = _key("last", choices=("last", "all"))


@dataclasses.dataclass(frozen=True)
class PartSection:
    """An entry of `objective.mixture`.

    Attributes:
        name: name of an objective.
        weight: its share, a whole number.
    """

    name: str
    weight: int = _key(1, least=1)


@dataclasses.dataclass(frozen=True)
class DenoiserSection:
    """An entry of `objective.denoisers`.

    Attributes:
        rate: share of corrupted tokens.
        mean_span: mean length of a span in tokens; left out for one span at the end of the sequence.
        weight: its share, a whole number.
    """

    rate: float = _key(above=0)
    mean_span: float | None = _key(None, least=1)
    weight: int = _key(1, least=1)


@dataclasses.dataclass(frozen=True)
class ObjectiveSection:
    """`[objective]`: what an encoder-decoder learns. It needs `name`, `mixture` or `denoisers`, and both lengths.

    Attributes:
        encoder_length: S, the number of tokens that the encoder reads.
        decoder_length: T, the number of tokens that the decoder reads.
        name: "prefixlm", "span_corruption", "ul2", "t5gemma2"; or "supervised" for pairs and chats.
        mixture: several objectives (except "supervised"), e.g. `[{ name = "ul2", weight = 3 }, { name = "prefixlm" }]`.
        denoisers: UL2 with custom denoisers, e.g. `[{ mean_span = 3, rate = 0.15 }, { rate = 0.25, weight = 2 }]`.
        mode_tokens: the first id of the inputs per mode R, S and X; PrefixLM uses that of S, span corruption that of R.
        sentinels: the first and the last id of the sentinels; `<unused0>` to `<unused98>` if left out.
        too_few_sentinels: if sentinels run out, "cap" to limit the raw length, or "merge" for longer spans.
    """

    encoder_length: int | None = _key(None, least=1)
    decoder_length: int | None = _key(None, least=1)
    name: str | None = None
    mixture: tuple[PartSection, ...] = ()
    denoisers: tuple[DenoiserSection, ...] = ()
    mode_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    sentinels: tuple[int, ...] = _key((), least=0, most_items=2)
    too_few_sentinels: str = _key("cap", choices=("cap", "merge"))

    @property
    def lengths(self) -> tuple[int, int]:
        """`(S, T)`, of a recipe without a `[task]`."""
        return cast(tuple[int, int], (self.encoder_length, self.decoder_length))


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    """`[optimizer]`: the optimizer and its schedule, see `keras_t5gemma.optimizer`.

    Attributes:
        learning_rate: the peak of the schedule.
        name: the optimizer.
        warmup_steps: number of steps of the linear warm-up.
        decay_steps: the step at which the cosine ends; the last step of the training if left out.
        final_fraction: fraction of the peak at the end of the cosine and after it.
        weight_decay: a step shrinks weights by the fraction `learning_rate * weight_decay`.
        clip_norm: the largest global norm of the gradients.
        beta_1: beta_1 of AdamW; Keras's 0.9 if left out.
        beta_2: beta_2 of AdamW; Keras's 0.999 if left out.
    """

    learning_rate: float = _key(above=0)
    name: str = _key("adamw", choices=("adamw", "adafactor", "muon"))
    warmup_steps: int = _key(100, least=0)
    decay_steps: int | None = _key(None, least=1)
    final_fraction: float = _key(0.1, least=0, most=1)
    weight_decay: float = _key(0.01, least=0)
    clip_norm: float = _key(1.0, above=0)
    beta_1: float | None = _key(None, least=0, most=1)
    beta_2: float | None = _key(None, least=0, most=1)


@dataclasses.dataclass(frozen=True)
class TrainingSection:
    """`[training]`: number and size of the steps, losses, logs and checkpoints.

    Attributes:
        steps: total number of steps.
        batch_size: B, rows per step, over all devices, processes and accumulated parts.
        accumulation_steps: number of parts into which a step divides its batch, to need less memory.
        cross_attention_steps: number of first steps that train only cross-attention, for unbalanced pairs.
        z_loss: weight of the squared logsumexp of the logits.
        label_smoothing: share of the target that is spread over the vocabulary.
        seed: seed of the order, the examples and all other random draws.
        log_every: steps averaged in one row of the logs; must divide `steps`.
        evaluate_every: steps between evaluations of the held-out loss, a multiple of `log_every`; 0 for none.
        evaluate_batches: batches per denoiser in one evaluation; a task measures all rows.
        save_every: steps between checkpoints.
        keep: number of newest checkpoints to keep.
    """

    steps: int = _key(least=1)
    batch_size: int = _key(least=1)
    accumulation_steps: int = _key(1, least=1)
    cross_attention_steps: int = _key(0, least=0)
    z_loss: float = _key(0.0, least=0)
    label_smoothing: float = _key(0.0, least=0, most=1)
    seed: int = _key(0, least=0)
    log_every: int = _key(10, least=1)
    evaluate_every: int = _key(0, least=0)
    evaluate_batches: int = _key(8, least=1)
    save_every: int = _key(1_000, least=1)
    keep: int = _key(5, least=1)


@dataclasses.dataclass(frozen=True)
class DistillationSection:
    """`[distillation]`: learns from a teacher if `teacher` is stated, see `keras_t5gemma.Distillation`.

    Attributes:
        teacher: a Gemma 2: a folder or a keras-hub preset.
        dtype: dtype policy of the teacher, which is not trained.
        temperature: temperature of both softmaxes.
        hard_weight: weight of the loss on the labels; the loss on the teacher's logits has the rest.
    """

    teacher: str | None = None
    dtype: str = _key("bfloat16", choices=DTYPES)
    temperature: float = _key(1.0, above=0)
    hard_weight: float = _key(0.0, least=0, most=1)


@dataclasses.dataclass(frozen=True)
class PreferenceSection:
    """`[preference]`: learns from preferences if `loss` is stated, see `keras_t5gemma.PreferenceLoss`.

    The rows of `[data]` are then those of `keras_t5gemma.preference_dataset`, and the objective is "supervised".

    Attributes:
        loss: the kind of loss.
        beta: how strongly the loss holds the model to the reference.
        label_smoothing: the share of preferences that are assumed to be wrong, for dpo, robust, simpo and cpo.
        gamma: the margin of simpo.
        alpha: the weight of the cross-entropy of cpo.
        desirable_weight: the weight of desirable answers of kto.
        undesirable_weight: the weight of the other answers of kto.
        reference: "precomputed" to compute the reference once, into reference/ in the folder of the run; "lora_off" for
            the model without its LoRA. For losses with a reference, the former if left out.
    """

    loss: str | None = _key(None, choices=PREFERENCE_LOSSES)
    beta: float = _key(0.1, above=0)
    label_smoothing: float | None = _key(None, least=0, most=0.5)
    gamma: float | None = _key(None, least=0)
    alpha: float | None = _key(None, least=0)
    desirable_weight: float | None = _key(None, least=0)
    undesirable_weight: float | None = _key(None, least=0)
    reference: str | None = _key(None, choices=("precomputed", "lora_off"))


@dataclasses.dataclass(frozen=True)
class EvaluationSection:
    """`[evaluation]`: generates answers to held-out prompts during the run, see `keras_t5gemma.GenerationMetrics`.

    The values are in the log as `val_<metric>`, in the rows of the steps at which they are measured. Keys without which
    nothing is generated are `prompts` and `every`.

    Attributes:
        prompts: files or patterns of held-out pairs or chats, JSONL or Parquet, in the fields that [data] pair_fields
            names; empty for no generation.
        metrics: what is computed of the answers.
        every: steps between two evaluations, a multiple of [training] log_every; 0 for none.
        max_new_tokens: maximum number of tokens of an answer; what [objective] decoder_length leaves if left out.
        limit: number of pairs to take, the first ones; all if left out.
        samples: number of answers that are printed at each evaluation.
        batch_size: prompts that are answered together.
        best: a held-out value of the log, such as "val_rougeL" or "val_loss". The checkpoint in which it is best is
            kept, and its weights are the model that the run writes; the last weights if left out.
    """

    prompts: tuple[str, ...] = ()
    metrics: tuple[str, ...] = _key(("exact_match",), choices=METRICS, least_items=1)
    every: int = _key(0, least=0)
    max_new_tokens: int | None = _key(None, least=1)
    limit: int | None = _key(None, least=1)
    samples: int = _key(3, least=0)
    batch_size: int = _key(8, least=1)
    best: str | None = None


@dataclasses.dataclass(frozen=True)
class TaskSection:
    """`[task]`: trains a model with a head if `head` is stated, see `keras_t5gemma.T5GemmaTextClassifier`.

    There is then no [objective], and the rows of [data] have fields. The head is new, also if the preset has one. All
    rows of [data] validation are measured, and the log has `val_loss` and `val_accuracy`.

    Attributes:
        head: the kind of model. The rows of a "text_classifier" have a text or a pair, and a label; those of a
            "token_classifier" a list of words, and a label per word; those of a "text_embedder" a query and a document.
        labels: of a classifier, names of the classes, in the order of their ids; empty for a regression, which learns
            one number.
        text_fields: the field of the text or the words; the two fields of a pair; or the fields of the query, the
            document and any hard negatives.
        label_field: of a classifier, the field of the label: a name or an id; for "multi" a list of them; for
            "regression" a number; for words a list with one per word.
        problem: of a text classifier, "single": one class per text; "multi": any number of classes; "regression": a
            number.
        pooling: "last" token, the default of a text classifier; or "mean" of all tokens, that of an embedder. For a
            text classifier "mean" needs [output] format = "keras".
        stack: of a classifier, "encoder"; or "decoder", the encoder-decoder mode of `transformers`.
        dropout: of a classifier, the rate before the head.
        normalize: of an embedder, whether vectors have length 1.
        dimensions: of an embedder, the numbers of a vector that are kept; all if left out.
        temperature: of an embedder's loss, `InBatchNegatives`.
        matryoshka: of the same loss, widths to which vectors may be cut afterwards.
        sequence_length: S, the maximum number of tokens of a text or a pair.
        truncate: the end at which a text that is too long is cut; an error if left out. Of words, "right" alone.
        separator: of a text classifier, the text between the parts of a pair.
    """

    head: str | None = _key(None, choices=("text_classifier", "token_classifier", "text_embedder"))
    labels: tuple[str, ...] = ()
    text_fields: tuple[str, ...] = _key(("text",), least_items=1)
    label_field: str = "label"
    problem: str = _key("single", choices=("single", "multi", "regression"))
    pooling: str | None = _key(None, choices=("last", "mean"))
    stack: str = _key("encoder", choices=("encoder", "decoder"))
    dropout: float = _key(0.0, least=0, most=0.99)
    normalize: bool = True
    dimensions: int | None = _key(None, least=1)
    temperature: float = _key(0.05, above=0)
    matryoshka: tuple[int, ...] = _key((), least=1)
    sequence_length: int = _key(512, least=1)
    truncate: str | None = _key(None, choices=("left", "right"))
    separator: str = "\n"


@dataclasses.dataclass(frozen=True)
class HardwareSection:
    """`[hardware]`: sharding over devices and processes, on JAX; see `keras_t5gemma.layout_map`.

    Attributes:
        mesh: number of devices along the batch and, optionally, along each layer; empty for one device.
        fully_sharded: whether weights are also sharded over the devices along the batch.
        processes: number of processes, of which the devices along the batch are a multiple. Each runs the same command;
            `keras.distribution.initialize` finds the others through environment variables. "auto" for as many as
            KERAS_DISTRIBUTION_NUM_PROCESSES says, or as TPU_WORKER_HOSTNAMES has.
    """

    mesh: tuple[int, ...] = _key((), least=1, most_items=2)
    fully_sharded: bool = True
    processes: int = _key(1, least=1)


@dataclasses.dataclass(frozen=True)
class OutputSection:
    """`[output]`: the folder of the run and the files in it.

    Attributes:
        folder: folder of the run: recipe.toml, log.csv, checkpoints/, and model/ at the end.
        average_last: number of last checkpoints whose mean is the model; 0 for the last weights.
        format: format of the model: "hf", or "keras" for a preset, which needs a single process.
        tensorboard: whether to write logs for TensorBoard too, into tensorboard/.
    """

    folder: str
    average_last: int = _key(0, least=0)
    format: str = _key("hf", choices=("hf", "keras"))
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe, with one field per section of the file.

    Attributes:
        model: a `ModelSection`.
        data: a `DataSection`.
        objective: an `ObjectiveSection`; left out for a task.
        optimizer: an `OptimizerSection`.
        training: a `TrainingSection`.
        output: an `OutputSection`.
        distillation: a `DistillationSection`.
        preference: a `PreferenceSection`.
        evaluation: an `EvaluationSection`.
        task: a `TaskSection`.
        hardware: a `HardwareSection`.
    """

    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = dataclasses.field(default=ObjectiveSection(), kw_only=True)
    optimizer: OptimizerSection
    training: TrainingSection
    output: OutputSection
    distillation: DistillationSection = DistillationSection()
    preference: PreferenceSection = PreferenceSection()
    evaluation: EvaluationSection = EvaluationSection()
    task: TaskSection = TaskSection()
    hardware: HardwareSection = HardwareSection()
