"""The model that a run writes at its end."""

from pathlib import Path
from typing import Any

from keras_t5gemma.checkpoints.atomic_folder import new_folder
from keras_t5gemma.checkpoints.convert import average_checkpoints
from keras_t5gemma.checkpoints.hugging_face.export import export_to_hugging_face
from keras_t5gemma.checkpoints.hugging_face.peft import save_lora
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.recipes.run_folder import CHECKPOINTS_FOLDER, MODEL_FOLDER
from keras_t5gemma.recipes.schema import Recipe
from keras_t5gemma.training.checkpointing.weights import best_of_run, load_training_weights, training_weights


def write_model(lm: Any, recipe: Recipe, folder: Path) -> None:
    """Writes the model of a run that has ended.

    These are the weights of the best checkpoint if the recipe says by which value, else the mean of the last ones if it
    says so, else the last weights. Of a language model with LoRA, only the adapters are written. A classifier is always
    written as a whole; in Hugging Face's format its LoRA is merged.

    Args:
        lm: the model, with its last weights.
        recipe: a `Recipe`.
        folder: the run's.
    """
    output, target = recipe.output, folder / MODEL_FOLDER
    if recipe.evaluation.best:
        load_training_weights(lm, folder / CHECKPOINTS_FOLDER, best=True)
    elif recipe.task.head and output.average_last:
        load_training_weights(lm, folder / CHECKPOINTS_FOLDER, last=output.average_last)
    if recipe.model.lora_rank and not recipe.task.head:
        save_lora(lm, target, base_model=recipe.model.preset)
        return
    if recipe.hardware.processes > 1:
        if output.average_last:
            # Each process averages the tensors that it holds, and needs only its own files for that.
            load_training_weights(lm, folder / CHECKPOINTS_FOLDER, last=output.average_last)
        export_to_hugging_face(lm, target)
        return
    if not output.average_last or recipe.task.head:
        if output.format == "hf":
            export_to_hugging_face(lm, target)
        else:
            _save_preset(lm, target)
        return
    weights = training_weights(folder / CHECKPOINTS_FOLDER, last=output.average_last)
    if output.format == "hf":
        average_checkpoints(weights, target)
        return
    mean = folder / f"{MODEL_FOLDER}_hf"
    if not mean.exists():  # a killed run may have written it
        average_checkpoints(weights, mean)
    _save_preset(T5GemmaSeq2SeqLM.from_preset(str(mean)), target)


def _save_preset(lm: Any, target: Path) -> None:
    with new_folder(target) as folder:
        lm.save_to_preset(str(folder))


def description(recipe: Recipe, folder: Path) -> str:
    """Which weights of a run its model has, as the end of a sentence; empty for the last ones."""
    if recipe.evaluation.best:
        best = best_of_run(folder / CHECKPOINTS_FOLDER)
        return f", the weights of step {best['step']:,}, where {best['monitor']} is best: {best['value']:.4g}"
    return ""
