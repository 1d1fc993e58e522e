"""T5Gemma for Keras 3: turn Gemma 2 into an encoder-decoder, train it with UL2 and PrefixLM, generate.

`import keras_t5gemma as kt` is cheap: the module of a public name, and Keras with it, is imported at its first use, or
once Keras is, whose `load_model` must find the package's classes.
"""

import importlib

from keras_t5gemma.registration import register_with_keras

__version__ = "0.1.0"

# Public name -> the module that holds it.
_MODULES = {
    "PAIRS": "presets",
    "PRESETS": "presets",
    "STACKS": "presets",
    "StackConfig": "config",
    "T5GemmaConfig": "config",
    "T5GemmaTokenizer": "text.tokenizer",
    "T5GemmaSeq2SeqLMPreprocessor": "text.preprocessor",
    "train_tokenizer": "text.train_tokenizer",
    "Denoiser": "objectives.span_corruption",
    "Mixture": "objectives.mixture",
    "PrefixLM": "objectives.prefix_lm",
    "SpanCorruption": "objectives.span_corruption",
    "UL2": "objectives.ul2",
    "objective": "objectives.recipes",
    "distillation_dataset": "objectives.teacher_view",
    "packed_arrays": "objectives.packing",
    "pretraining_dataset": "objectives.dataset",
    "supervised_dataset": "objectives.supervised",
    "text_source": "objectives.sources",
    "CrossAttentionWarmup": "training.callbacks",
    "TrainingCheckpoint": "training.resume",
    "load_training_weights": "training.resume_weights",
    "training_weights": "training.resume_weights",
    "BeamSampler": "generation.beam_sampler",
    "ForbiddenTokens": "generation.processors",
    "ForcedTokens": "generation.processors",
    "MinimumLength": "generation.processors",
    "NoRepeatNgrams": "generation.processors",
    "RepetitionPenalty": "generation.processors",
    "TopKTopPSampler": "generation.random_sampler",
    "TrainingLog": "training.logs",
    "held_out_by_part": "training.evaluation",
    "plot_runs": "training.plots",
    "Distillation": "training.distillation",
    "StoredTeacher": "training.stored_logits",
    "store_teacher_logits": "training.stored_logits",
    "VocabularyCrossEntropy": "training.losses",
    "optimizer": "training.optimizers",
    "adapt_gemma2": "models.adapted",
    "adapt_gemma2_files": "checkpoints.convert",
    "average_checkpoints": "checkpoints.convert",
    "convert_checkpoint": "checkpoints.convert",
    "CheckpointError": "checkpoints.tensors",
    "export_to_hugging_face": "checkpoints.export",
    "load_lora": "checkpoints.adapters",
    "save_lora": "checkpoints.adapters",
    "T5GemmaBackbone": "models.backbone",
    "Buckets": "models.shapes",
    "layout_map": "models.distribution",
    "T5GemmaSeq2SeqLM": "models.seq2seq_lm",
    "read_recipe": "recipes.reading",
    "run_recipe": "recipes.run",
}

__all__ = ["__version__", *sorted(_MODULES)]  # noqa: PLE0604 the table above is all strings


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public names: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


register_with_keras()
