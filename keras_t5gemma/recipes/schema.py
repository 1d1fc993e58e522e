"""Every key of a training recipe, with its type, its range and its meaning. Needs no Keras."""

import dataclasses

DTYPES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")


def _key(default=dataclasses.MISSING, **limits):
    """A field. Its value is limited by `least`, `above`, `most`, `choices`; a list by `least_items`, `most_items`."""
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """`[model]`: what is trained. It needs `preset` or `adapt`.

    Attributes:
        preset: a T5Gemma to go on with: a built-in name, hf://owner/name, kaggle://... or a folder.
        adapt: one Gemma 2, or two, encoder and decoder, to make a T5Gemma of: as for `keras-t5gemma adapt`.
        tokenizer: with `adapt`, where the tokenizer comes from; the last Gemma 2 where left out.
        cross_attention: with `adapt`, where it starts from; auto: from scratch only where the two Gemma 2 differ.
        encoder_attention: with `adapt`, "causal" is an ablation.
        encoder_heads: with `adapt`, "multi" is an ablation.
        dtype: of weights and computing, as in Keras; "mixed_bfloat16" keeps weights in float32.
        lora_rank: 0 to train every weight, else the rank of LoRA's factors, which are trained and written alone.
        rematerialize: whether activations are computed again in the backward pass, which saves memory.
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
    """`[data]`: what is read, see `text_source` and `pretraining_dataset`.

    Attributes:
        sources: files or patterns, seen from the folder the command runs in, all of one format.
        validation: likewise, texts to measure on; none where empty.
        format: of both; by the files' names where left out.
        field: the field or column that holds the text.
        sample_by: what is a document of a text file.
        documents: "joined" to one stream, or each for itself, "whole".
        pack: whether several examples share a row.
        num_workers: processes that read and tokenize; their number does not change the data.
        shuffle_buffer: texts that are shuffled together where the source has no random access.
        pack_buffer: examples that are looked at together to pack them.
        pair_fields: of the objective "supervised": the names of input and target.
        answers: of the objective "supervised": which answers of a chat are learned.
    """

    sources: tuple[str, ...] = _key(least_items=1)
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
        name: of an objective.
        weight: its share, a whole number.
    """

    name: str
    weight: int = _key(1, least=1)


@dataclasses.dataclass(frozen=True)
class DenoiserSection:
    """An entry of `objective.denoisers`.

    Attributes:
        rate: share of the tokens that is corrupted.
        mean_span: in tokens; left out for one span that is the sequence's end.
        weight: its share, a whole number.
    """

    rate: float = _key(above=0)
    mean_span: float | None = _key(None, least=1)
    weight: int = _key(1, least=1)


@dataclasses.dataclass(frozen=True)
class ObjectiveSection:
    """`[objective]`: what is learned. It needs `name`, `mixture` or `denoisers`.

    Attributes:
        encoder_length: S, tokens the encoder reads.
        decoder_length: T, tokens the decoder reads.
        name: "prefixlm", "span_corruption", "ul2", "t5gemma2"; or "supervised" for pairs and chats.
        mixture: several of them (but "supervised"), e.g. `[{ name = "ul2", weight = 3 }, { name = "prefixlm" }]`.
        denoisers: UL2 with denoisers of your own, e.g. `[{ mean_span = 3, rate = 0.15 }, { rate = 0.25, weight = 2 }]`.
        mode_tokens: ids by mode, R, S and X, that stand first in the inputs; PrefixLM takes S's, span corruption R's.
        sentinels: the first and the last id of the sentinels; `<unused0>` to `<unused98>` where left out.
        too_few_sentinels: "cap" raw length where they run out, or "merge" spans.
    """

    encoder_length: int = _key(least=1)
    decoder_length: int = _key(least=1)
    name: str | None = None
    mixture: tuple[PartSection, ...] = ()
    denoisers: tuple[DenoiserSection, ...] = ()
    mode_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    sentinels: tuple[int, ...] = _key((), least=0, most_items=2)
    too_few_sentinels: str = _key("cap", choices=("cap", "merge"))


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    """`[optimizer]`, see `keras_t5gemma.optimizer`.

    Attributes:
        learning_rate: the peak.
        name: the optimiser.
        warmup_steps: of the linear warm-up.
        decay_steps: the step at which the cosine ends; that of the training where left out.
        final_fraction: of the peak, where the cosine ends, and what follows it has.
        weight_decay: a step's shrinkage is `learning_rate * weight_decay`.
        clip_norm: the largest global norm of the gradients.
        beta_1: AdamW's; Keras's 0.9 where left out.
        beta_2: AdamW's; Keras's 0.999 where left out.
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
    """`[training]`: how long and how much at once.

    Attributes:
        steps: in all.
        batch_size: B, rows a step, of all devices, processes and parts together.
        accumulation_steps: parts that a step runs its batch in, one after the other, to need less memory.
        cross_attention_steps: first steps, which train cross-attention alone: for unbalanced pairs.
        z_loss: weight of the square of the logits' log-sum.
        label_smoothing: share of the target spread over the vocabulary.
        seed: of the order, the examples and whatever is drawn at random.
        log_every: steps a row of the logs is the mean of; divides `steps`.
        evaluate_every: steps between two measurements of the held-out loss; a multiple of `log_every`; 0 for none.
        evaluate_batches: batches a denoiser that one of them takes.
        save_every: steps between two checkpoints.
        keep: how many of the newest to keep.
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
    """`[distillation]`: a teacher, none where `teacher` is left out; see `keras_t5gemma.Distillation`.

    Attributes:
        teacher: a Gemma 2: a folder or a keras-hub preset.
        dtype: of the teacher, which is not trained.
        temperature: of both softmaxes.
        hard_weight: of the loss on the labels; the rest is the teacher's.
    """

    teacher: str | None = None
    dtype: str = _key("bfloat16", choices=DTYPES)
    temperature: float = _key(1.0, above=0)
    hard_weight: float = _key(0.0, least=0, most=1)


@dataclasses.dataclass(frozen=True)
class HardwareSection:
    """`[hardware]`: how the work is divided, on JAX; see `keras_t5gemma.layout_map`.

    Attributes:
        mesh: devices along the batch and, where there are two numbers, along each layer; empty for one device.
        fully_sharded: whether weights are divided along the batch's devices, too.
        processes: how many there are; the devices along the batch are a multiple of it. Each runs the same command;
            `keras.distribution.initialize` finds the others by the environment.
    """

    mesh: tuple[int, ...] = _key((), least=1, most_items=2)
    fully_sharded: bool = True
    processes: int = _key(1, least=1)


@dataclasses.dataclass(frozen=True)
class OutputSection:
    """`[output]`: what is written where.

    Attributes:
        folder: of the run: recipe.toml, log.csv, checkpoints/, and model/ at the end.
        average_last: the model is the mean of so many of the last checkpoints; 0 for the last weights.
        format: of the model: "hf", or, of one process, "keras" for a preset.
        tensorboard: whether logs are written for TensorBoard, too, into tensorboard/.
    """

    folder: str
    average_last: int = _key(0, least=0)
    format: str = _key("hf", choices=("hf", "keras"))
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole recipe, a field a section of the file.

    Attributes:
        model: a `ModelSection`.
        data: a `DataSection`.
        objective: an `ObjectiveSection`.
        optimizer: an `OptimizerSection`.
        training: a `TrainingSection`.
        output: an `OutputSection`.
        distillation: a `DistillationSection`.
        hardware: a `HardwareSection`.
    """

    model: ModelSection
    data: DataSection
    objective: ObjectiveSection
    optimizer: OptimizerSection
    training: TrainingSection
    output: OutputSection
    distillation: DistillationSection = DistillationSection()
    hardware: HardwareSection = HardwareSection()
