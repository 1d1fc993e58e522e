"""Builds the model, the data and the optimizer of a recipe."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import grain
import keras
import keras_hub

from keras_t5gemma.data.objectives.example import Objective
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset
from keras_t5gemma.data.pipelines.mixed_sources import mix_sources
from keras_t5gemma.data.pipelines.preferences import preference_dataset
from keras_t5gemma.data.pipelines.supervised import supervised_dataset
from keras_t5gemma.data.pipelines.teacher_view import distillation_dataset
from keras_t5gemma.data.sources.open import text_source
from keras_t5gemma.models.adapted import adapt_gemma2
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.recipes.objective_section import SUPERVISED
from keras_t5gemma.recipes.schema import Recipe
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer
from keras_t5gemma.training.evaluation import first_batches, held_out_by_part
from keras_t5gemma.training.losses.cross_entropy import VocabularyCrossEntropy
from keras_t5gemma.training.losses.distillation import Distillation
from keras_t5gemma.training.losses.preference import PreferenceLoss
from keras_t5gemma.training.losses.reference import ReferenceLogProbs, reference_log_probs
from keras_t5gemma.training.optimizers.factory import optimizer


def compiled_model(recipe: Recipe) -> T5GemmaSeq2SeqLM:
    """Builds and compiles the model of a `Recipe`, with its preprocessor."""
    section, training = recipe.model, recipe.training
    if section.preset:
        lm = T5GemmaSeq2SeqLM.from_preset(section.preset, dtype=section.dtype)
        if lm.preprocessor is None:
            raise ValueError(
                f"[model] preset: expected a preset with a tokenizer, to train on texts. Received: "
                f"preset={section.preset!r}, which has none. Save one beside the weights: "
                f"`T5GemmaSeq2SeqLM(backbone, preprocessor).save_to_preset(folder)`."
            )
    else:
        backbone, tokenizer = adapted(recipe)
        lm = T5GemmaSeq2SeqLM(backbone, T5GemmaSeq2SeqLMPreprocessor(tokenizer, *recipe.objective.lengths))
    lm = cast(Any, lm)  # keras-hub's class does not say the type of `backbone`
    if section.lora_rank:
        lm.backbone.enable_lora(section.lora_rank)
    lm.backbone.rematerialize = section.rematerialize
    lm.compile(optimizer=make_optimizer(recipe), loss=_loss(recipe), accumulation_steps=training.accumulation_steps)
    return lm


def reference(recipe: Recipe, lm: T5GemmaSeq2SeqLM, folder: Path) -> ReferenceLogProbs:
    """Computes what a reference gives to all answers of a `Recipe`, held-out ones too.

    Args:
        recipe: a `Recipe` that `precomputes_reference`.
        lm: its model, before it is trained.
        folder: the folder to keep the numbers in; what it has already is not computed again.

    Returns:
        The `ReferenceLogProbs`.
    """
    preprocessor = cast(Any, lm.preprocessor)
    once = {"shuffle": False, "num_epochs": 1, "drop_remainder": False}
    for paths in filter(None, (recipe.data.sources, recipe.data.validation)):
        stored = reference_log_probs(lm, _dataset(recipe, paths, preprocessor, None, 0, **once), folder)
    return stored


def training_data(
    recipe: Recipe,
    preprocessor: T5GemmaSeq2SeqLMPreprocessor,
    objective: Objective | None,
    index: int,
    stored: ReferenceLogProbs | None = None,
) -> grain.MapDataset | grain.IterDataset:
    """Makes the endless dataset of a `Recipe`.

    Args:
        recipe: a `Recipe`.
        preprocessor: the model's.
        objective: made by `make_objective`; None for "supervised".
        index: this process's, which reads a share of the texts.
        stored: the result of `reference`, or None.

    Returns:
        A Grain dataset of batches for `fit`.
    """
    data = _dataset(recipe, recipe.data.sources, preprocessor, objective, index)
    return data if stored is None else stored.join(data)


def held_out_batches(
    recipe: Recipe,
    preprocessor: T5GemmaSeq2SeqLMPreprocessor,
    objective: Objective | None,
    index: int,
    stored: ReferenceLogProbs | None = None,
) -> dict[str, tuple] | None:
    """Makes the held-out batches of a `Recipe`, for `TrainingLog`.

    Args:
        recipe: a `Recipe`.
        preprocessor: the model's.
        objective: made by `make_objective`; None for "supervised".
        index: this process's, which reads a share of the texts.
        stored: the result of `reference`, or None.

    Returns:
        Name -> (batches, weight), the `held_out` of `TrainingLog`; None if the recipe has no validation texts.
    """
    data, training = recipe.data, recipe.training
    if not data.validation:
        return None
    if objective is None:
        batches = _dataset(recipe, data.validation, preprocessor, None, index, shuffle=False, num_epochs=1)
        name = "preferences" if recipe.preference.loss else "supervised"
        batches = batches if stored is None else stored.join(batches)
        return {name: (first_batches(batches, training.evaluate_batches), 1)}
    return held_out_by_part(
        open_source(recipe, data.validation, index),
        preprocessor.tokenizer,
        objective,
        num_batches=training.evaluate_batches,
        batch_size=training.batch_size // recipe.hardware.processes,
        seed=training.seed,
        documents=data.documents,
        pack=data.pack,
        drop_remainder=True,
        view=partial(_view, recipe, preprocessor.tokenizer),
    )


def _view(recipe: Recipe, tokenizer: object, data: Any, objective: Objective | None) -> Any:
    """A dataset in the form of the loss: with the teacher's view if the recipe has a teacher."""
    return distillation_dataset(data, objective, tokenizer) if recipe.distillation.teacher else data


def adapted(recipe: Recipe) -> tuple[T5GemmaBackbone, T5GemmaTokenizer]:
    """Adapts the Gemma 2 of a `Recipe`, and loads their tokenizer."""
    section = recipe.model
    backbone = adapt_gemma2(
        *section.adapt,
        cross_attention=section.cross_attention,
        encoder_attention=section.encoder_attention,
        encoder_heads=section.encoder_heads,
        seed=recipe.training.seed,
        dtype=section.dtype,
    )
    return backbone, T5GemmaTokenizer.from_preset(section.tokenizer or section.adapt[-1])


def make_optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    """Makes the optimizer of a `Recipe`."""
    section = recipe.optimizer
    betas = {name: getattr(section, name) for name in ("beta_1", "beta_2")}
    return optimizer(
        section.name,
        learning_rate=section.learning_rate,
        steps=section.decay_steps,
        warmup_steps=section.warmup_steps,
        final_fraction=section.final_fraction,
        weight_decay=section.weight_decay,
        clip_norm=section.clip_norm,
        **{name: beta for name, beta in betas.items() if beta is not None},
    )


def _loss(recipe: Recipe) -> Distillation | PreferenceLoss | VocabularyCrossEntropy:
    if recipe.preference.loss:
        options = {name: value for name, value in dataclasses.asdict(recipe.preference).items() if name != "loss"}
        try:
            return PreferenceLoss(recipe.preference.loss, **options)
        except ValueError as error:
            raise ValueError(f"[preference]: {error}") from error
    training, section = recipe.training, recipe.distillation
    if section.teacher:
        teacher = keras_hub.models.GemmaCausalLM.from_preset(section.teacher, dtype=section.dtype)
        return Distillation(teacher, temperature=section.temperature, hard_weight=section.hard_weight)
    return VocabularyCrossEntropy(z_loss=training.z_loss, label_smoothing=training.label_smoothing)


def open_source(recipe: Recipe, paths: Sequence[str], index: int) -> grain.MapDataset | grain.IterDataset:
    """Opens a process's share of the texts or rows of a recipe.

    Args:
        recipe: a `Recipe`.
        paths: the recipe's `sources` or its `validation`.
        index: the process's.

    Raises:
        ValueError: as for `text_source`; the message names the key.
    """
    data = recipe.data
    open_paths = partial(
        text_source,
        field=data.field if recipe.objective.name != SUPERVISED and not recipe.task.head else None,
        format=data.format,
        sample_by=data.sample_by,
        shard_index=index,
        shard_count=recipe.hardware.processes,
    )
    try:
        if _is_mixed(recipe, paths):
            sources = [open_paths([path]) for path in paths]
            seed = recipe.training.seed
            return mix_sources(sources, data.weights, seed=seed, shuffle_buffer=data.shuffle_buffer)
        return open_paths(list(paths))
    except (ValueError, OSError) as error:
        key = "sources" if paths is data.sources else "validation"
        raise ValueError(f"[data] {key}: {error}") from error


def _is_mixed(recipe: Recipe, paths: Sequence[str]) -> bool:
    """Whether paths are mixed by weight, and so come shuffled."""
    return bool(recipe.data.weights) and paths is recipe.data.sources


def _dataset(
    recipe: Recipe,
    paths: Sequence[str],
    preprocessor: T5GemmaSeq2SeqLMPreprocessor,
    objective: Objective | None,
    index: int,
    **options: Any,
) -> grain.MapDataset | grain.IterDataset:
    """A process's share of the batches of a recipe.

    Args:
        recipe: a `Recipe`.
        paths: the recipe's `sources` or its `validation`.
        preprocessor: the model's.
        objective: made by `make_objective`; None for "supervised".
        index: the process's.
        **options: further arguments of the function that makes the dataset.

    Returns:
        A Grain dataset of batches.
    """
    data, training = recipe.data, recipe.training
    source = open_source(recipe, paths, index)
    options = {
        "batch_size": training.batch_size // recipe.hardware.processes,
        "seed": training.seed,
        "num_workers": data.num_workers,
        "shuffle_buffer": data.shuffle_buffer,
        "drop_remainder": True,  # processes and devices take batches of one shape
        "shuffle": not _is_mixed(recipe, paths),
        **options,
    }
    lengths = dict(zip(("encoder_length", "decoder_length"), recipe.objective.lengths, strict=True))
    if recipe.preference.loss:
        return preference_dataset(source, preprocessor, **lengths, **options)
    options |= {"pack": data.pack, "pack_buffer": data.pack_buffer}
    tokenizer = preprocessor.tokenizer
    if objective is not None:
        batches = pretraining_dataset(source, tokenizer, objective, documents=data.documents, **options)
    else:
        batches = supervised_dataset(
            source,
            preprocessor,
            **lengths,
            fields=data.pair_fields,
            answers=data.answers,
            **options,
        )
    return _view(recipe, tokenizer, batches, objective)
