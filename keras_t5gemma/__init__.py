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
    "Denoiser": "data.objectives.span_corruption",
    "Mixture": "data.objectives.mixture",
    "PrefixLM": "data.objectives.prefix_lm",
    "SpanCorruption": "data.objectives.span_corruption",
    "UL2": "data.objectives.ul2",
    "objective": "data.objectives.by_name",
    "distillation_dataset": "data.pipelines.teacher_view",
    "packed_arrays": "data.pipelines.packing",
    "pretraining_dataset": "data.pipelines.dataset",
    "supervised_dataset": "data.pipelines.supervised",
    "text_source": "data.sources.open",
    "CrossAttentionWarmup": "training.callbacks.cross_attention_warmup",
    "TrainingCheckpoint": "training.checkpointing.callback",
    "load_training_weights": "training.checkpointing.weights",
    "training_weights": "training.checkpointing.weights",
    "BeamSampler": "inference.samplers.beam",
    "ForbiddenTokens": "inference.logits_processors",
    "ForcedTokens": "inference.logits_processors",
    "MinimumLength": "inference.logits_processors",
    "NoRepeatNgrams": "inference.logits_processors",
    "RepetitionPenalty": "inference.logits_processors",
    "TopKTopPSampler": "inference.samplers.top_k_top_p",
    "TrainingLog": "training.callbacks.training_log",
    "held_out_by_part": "training.evaluation",
    "plot_runs": "training.callbacks.plots",
    "Distillation": "training.losses.distillation",
    "StoredTeacher": "training.losses.stored_teacher",
    "store_teacher_logits": "training.losses.stored_teacher",
    "VocabularyCrossEntropy": "training.losses.cross_entropy",
    "optimizer": "training.optimizers.factory",
    "adapt_gemma2": "models.adapted",
    "adapt_gemma2_files": "checkpoints.convert",
    "average_checkpoints": "checkpoints.convert",
    "convert_checkpoint": "checkpoints.convert",
    "CheckpointError": "checkpoints.tensor_source",
    "export_to_hugging_face": "checkpoints.hugging_face.export",
    "load_lora": "checkpoints.hugging_face.peft",
    "save_lora": "checkpoints.hugging_face.peft",
    "T5GemmaBackbone": "models.backbone",
    "Buckets": "inference.buckets",
    "layout_map": "models.sharding",
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
