"""Builds and compiles a model with a head."""

from collections.abc import Mapping
from typing import Any

from keras_t5gemma.recipes.components import adapted, make_optimizer
from keras_t5gemma.recipes.schema import Recipe


def compiled(cls: Any, recipe: Recipe, *, options: Mapping, inputs: Mapping, **compile_options: Any) -> Any:
    """Builds the model of a `Recipe` with a task, with its preprocessor and a new head, and compiles it.

    Args:
        cls: the class of the model.
        recipe: a `Recipe`.
        options: arguments of the class.
        inputs: arguments of its preprocessor.
        **compile_options: further arguments of `compile`.

    Raises:
        ValueError: if the preset has no tokenizer.
    """
    section = recipe.model
    if section.preset:
        try:
            preprocessor = cls.preprocessor_cls.from_preset(section.preset, **inputs)
        except ValueError as error:
            raise ValueError(f"[model] preset: a task needs a preset with a tokenizer. {error}") from error
        model = cls.from_preset(section.preset, **options, preprocessor=preprocessor, dtype=section.dtype)
    else:
        backbone, tokenizer = adapted(recipe)
        model = cls(backbone, preprocessor=cls.preprocessor_cls(tokenizer, **inputs), **options)
    if section.lora_rank:
        model.backbone.enable_lora(section.lora_rank)
    model.backbone.rematerialize = section.rematerialize
    steps = recipe.training.accumulation_steps
    model.compile(make_optimizer(recipe), accumulation_steps=steps, **compile_options)
    return model
