"""T5Gemma for Keras 3: turn Gemma 2 into an encoder-decoder, train it with UL2 and PrefixLM, generate.

`import keras_t5gemma as kt` is cheap: the module of a public name, and with it Keras, is imported when the name is
first used. If a program imports Keras, the modules with Keras classes follow at once, because `load_model` must find
the classes.
"""

import importlib
from typing import TYPE_CHECKING

from keras_t5gemma.registration import register_with_keras

__version__ = "0.1.0"

if TYPE_CHECKING:
    # Checkpoints on disk
    from keras_t5gemma.checkpoints.convert import adapt_gemma2_files as adapt_gemma2_files
    from keras_t5gemma.checkpoints.convert import average_checkpoints as average_checkpoints
    from keras_t5gemma.checkpoints.convert import convert_checkpoint as convert_checkpoint
    from keras_t5gemma.checkpoints.hugging_face.export import export_to_hugging_face as export_to_hugging_face
    from keras_t5gemma.checkpoints.hugging_face.peft import load_lora as load_lora
    from keras_t5gemma.checkpoints.hugging_face.peft import save_lora as save_lora
    from keras_t5gemma.checkpoints.tensor_source import CheckpointError as CheckpointError

    # Configurations
    from keras_t5gemma.config import StackConfig as StackConfig
    from keras_t5gemma.config import T5GemmaConfig as T5GemmaConfig

    # Data: objectives, pipelines, sources
    from keras_t5gemma.data.objectives.by_name import objective as objective
    from keras_t5gemma.data.objectives.mixture import Mixture as Mixture
    from keras_t5gemma.data.objectives.prefix_lm import PrefixLM as PrefixLM
    from keras_t5gemma.data.objectives.span_corruption import Denoiser as Denoiser
    from keras_t5gemma.data.objectives.span_corruption import SpanCorruption as SpanCorruption
    from keras_t5gemma.data.objectives.ul2 import UL2 as UL2
    from keras_t5gemma.data.pipelines.dataset import pretraining_dataset as pretraining_dataset
    from keras_t5gemma.data.pipelines.mixed_sources import mix_sources as mix_sources
    from keras_t5gemma.data.pipelines.packing import packed_arrays as packed_arrays
    from keras_t5gemma.data.pipelines.preferences import preference_dataset as preference_dataset
    from keras_t5gemma.data.pipelines.supervised import supervised_dataset as supervised_dataset
    from keras_t5gemma.data.pipelines.teacher_view import distillation_dataset as distillation_dataset
    from keras_t5gemma.data.sources.open import text_source as text_source
    from keras_t5gemma.evaluation.benchmarks import evaluate as evaluate

    # Evaluation
    from keras_t5gemma.evaluation.generation_metrics import GenerationMetrics as GenerationMetrics
    from keras_t5gemma.evaluation.harness import HarnessLM as HarnessLM

    # Exports to other runtimes
    from keras_t5gemma.exports.ctranslate2_export import export_ctranslate2 as export_ctranslate2
    from keras_t5gemma.exports.onnx_export import export_onnx as export_onnx
    from keras_t5gemma.exports.saved_model import export_saved_model as export_saved_model

    # Heads: classifiers of texts and of words, embedders
    from keras_t5gemma.heads.text_classifier import T5GemmaTextClassifier as T5GemmaTextClassifier
    from keras_t5gemma.heads.text_embedder import T5GemmaTextEmbedder as T5GemmaTextEmbedder
    from keras_t5gemma.heads.text_inputs import T5GemmaTextClassifierPreprocessor as T5GemmaTextClassifierPreprocessor
    from keras_t5gemma.heads.token_classifier import T5GemmaTokenClassifier as T5GemmaTokenClassifier
    from keras_t5gemma.heads.word_inputs import T5GemmaTokenClassifierPreprocessor as T5GemmaTokenClassifierPreprocessor

    # Inference: samplers, processors, buckets
    from keras_t5gemma.inference.buckets import Buckets as Buckets
    from keras_t5gemma.inference.logits_processors import ForbiddenTokens as ForbiddenTokens
    from keras_t5gemma.inference.logits_processors import ForcedTokens as ForcedTokens
    from keras_t5gemma.inference.logits_processors import MinimumLength as MinimumLength
    from keras_t5gemma.inference.logits_processors import NoRepeatNgrams as NoRepeatNgrams
    from keras_t5gemma.inference.logits_processors import RepetitionPenalty as RepetitionPenalty
    from keras_t5gemma.inference.samplers.beam import BeamSampler as BeamSampler
    from keras_t5gemma.inference.samplers.top_k_top_p import TopKTopPSampler as TopKTopPSampler

    # Models
    from keras_t5gemma.models.adapted import adapt_gemma2 as adapt_gemma2
    from keras_t5gemma.models.backbone import T5GemmaBackbone as T5GemmaBackbone
    from keras_t5gemma.models.encoder import T5GemmaEncoder as T5GemmaEncoder
    from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM as T5GemmaSeq2SeqLM
    from keras_t5gemma.models.sharding import layout_map as layout_map

    # The published models
    from keras_t5gemma.presets import PAIRS as PAIRS
    from keras_t5gemma.presets import PRESETS as PRESETS
    from keras_t5gemma.presets import STACKS as STACKS

    # Recipes
    from keras_t5gemma.recipes.reading import read_recipe as read_recipe
    from keras_t5gemma.recipes.run import run_recipe as run_recipe
    from keras_t5gemma.recipes.superglue.run import superglue as superglue

    # Learning from rewards
    from keras_t5gemma.reinforcement.reinforce import reinforce as reinforce

    # Serving
    from keras_t5gemma.serving.batcher import Batcher as Batcher
    from keras_t5gemma.serving.handles import BatcherClosed as BatcherClosed
    from keras_t5gemma.serving.handles import QueueFull as QueueFull
    from keras_t5gemma.serving.http.server import Server as Server

    # Text
    from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor as T5GemmaSeq2SeqLMPreprocessor
    from keras_t5gemma.text.tokenizer import T5GemmaTokenizer as T5GemmaTokenizer
    from keras_t5gemma.text.train_tokenizer import train_tokenizer as train_tokenizer

    # Training: losses, optimizers, callbacks, checkpoints of a run
    from keras_t5gemma.training.callbacks.cross_attention_warmup import CrossAttentionWarmup as CrossAttentionWarmup
    from keras_t5gemma.training.callbacks.plots import plot_runs as plot_runs
    from keras_t5gemma.training.callbacks.training_log import TrainingLog as TrainingLog
    from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint as TrainingCheckpoint
    from keras_t5gemma.training.checkpointing.weights import load_training_weights as load_training_weights
    from keras_t5gemma.training.checkpointing.weights import training_weights as training_weights
    from keras_t5gemma.training.evaluation import held_out_by_part as held_out_by_part
    from keras_t5gemma.training.losses.cross_entropy import VocabularyCrossEntropy as VocabularyCrossEntropy
    from keras_t5gemma.training.losses.distillation import Distillation as Distillation
    from keras_t5gemma.training.losses.in_batch_negatives import InBatchNegatives as InBatchNegatives
    from keras_t5gemma.training.losses.preference import PreferenceLoss as PreferenceLoss
    from keras_t5gemma.training.losses.reference import ReferenceLogProbs as ReferenceLogProbs
    from keras_t5gemma.training.losses.reference import reference_log_probs as reference_log_probs
    from keras_t5gemma.training.losses.stored_teacher import StoredTeacher as StoredTeacher
    from keras_t5gemma.training.losses.stored_teacher import store_teacher_logits as store_teacher_logits
    from keras_t5gemma.training.optimizers.factory import optimizer as optimizer

# Public name -> its module, for `__getattr__`. The imports above are the same table for type checkers, editors and the
# reference pages, which do not run this file. A test in tests/api compares the two.
_MODULES = {
    # Checkpoints on disk
    "adapt_gemma2_files": "checkpoints.convert",
    "average_checkpoints": "checkpoints.convert",
    "convert_checkpoint": "checkpoints.convert",
    "export_to_hugging_face": "checkpoints.hugging_face.export",
    "load_lora": "checkpoints.hugging_face.peft",
    "save_lora": "checkpoints.hugging_face.peft",
    "CheckpointError": "checkpoints.tensor_source",
    # Configurations
    "StackConfig": "config",
    "T5GemmaConfig": "config",
    # Data: objectives, pipelines, sources
    "objective": "data.objectives.by_name",
    "Mixture": "data.objectives.mixture",
    "PrefixLM": "data.objectives.prefix_lm",
    "Denoiser": "data.objectives.span_corruption",
    "SpanCorruption": "data.objectives.span_corruption",
    "UL2": "data.objectives.ul2",
    "pretraining_dataset": "data.pipelines.dataset",
    "packed_arrays": "data.pipelines.packing",
    "preference_dataset": "data.pipelines.preferences",
    "supervised_dataset": "data.pipelines.supervised",
    "distillation_dataset": "data.pipelines.teacher_view",
    "text_source": "data.sources.open",
    "mix_sources": "data.pipelines.mixed_sources",
    # Evaluation
    "GenerationMetrics": "evaluation.generation_metrics",
    "evaluate": "evaluation.benchmarks",
    "HarnessLM": "evaluation.harness",
    # Exports to other runtimes
    "export_ctranslate2": "exports.ctranslate2_export",
    "export_onnx": "exports.onnx_export",
    "export_saved_model": "exports.saved_model",
    # Heads: classifiers of texts and of words, embedders
    "T5GemmaTextClassifier": "heads.text_classifier",
    "T5GemmaTextClassifierPreprocessor": "heads.text_inputs",
    "T5GemmaTokenClassifier": "heads.token_classifier",
    "T5GemmaTokenClassifierPreprocessor": "heads.word_inputs",
    "T5GemmaTextEmbedder": "heads.text_embedder",
    # Inference: samplers, processors, buckets
    "Buckets": "inference.buckets",
    "ForbiddenTokens": "inference.logits_processors",
    "ForcedTokens": "inference.logits_processors",
    "MinimumLength": "inference.logits_processors",
    "NoRepeatNgrams": "inference.logits_processors",
    "RepetitionPenalty": "inference.logits_processors",
    "BeamSampler": "inference.samplers.beam",
    "TopKTopPSampler": "inference.samplers.top_k_top_p",
    # Models
    "adapt_gemma2": "models.adapted",
    "T5GemmaBackbone": "models.backbone",
    "T5GemmaEncoder": "models.encoder",
    "T5GemmaSeq2SeqLM": "models.seq2seq_lm",
    "layout_map": "models.sharding",
    # The published models
    "PAIRS": "presets",
    "PRESETS": "presets",
    "STACKS": "presets",
    # Recipes
    "read_recipe": "recipes.reading",
    "run_recipe": "recipes.run",
    "superglue": "recipes.superglue.run",
    # Learning from rewards
    "reinforce": "reinforcement.reinforce",
    # Serving
    "Batcher": "serving.batcher",
    "BatcherClosed": "serving.handles",
    "QueueFull": "serving.handles",
    "Server": "serving.http.server",
    # Text
    "T5GemmaSeq2SeqLMPreprocessor": "text.preprocessor",
    "T5GemmaTokenizer": "text.tokenizer",
    "train_tokenizer": "text.train_tokenizer",
    # Training: losses, optimizers, callbacks, checkpoints of a run
    "CrossAttentionWarmup": "training.callbacks.cross_attention_warmup",
    "plot_runs": "training.callbacks.plots",
    "TrainingLog": "training.callbacks.training_log",
    "TrainingCheckpoint": "training.checkpointing.callback",
    "load_training_weights": "training.checkpointing.weights",
    "training_weights": "training.checkpointing.weights",
    "held_out_by_part": "training.evaluation",
    "VocabularyCrossEntropy": "training.losses.cross_entropy",
    "Distillation": "training.losses.distillation",
    "PreferenceLoss": "training.losses.preference",
    "ReferenceLogProbs": "training.losses.reference",
    "reference_log_probs": "training.losses.reference",
    "InBatchNegatives": "training.losses.in_batch_negatives",
    "StoredTeacher": "training.losses.stored_teacher",
    "store_teacher_logits": "training.losses.stored_teacher",
    "optimizer": "training.optimizers.factory",
}

__all__ = ["__version__", *sorted(_MODULES)]  # noqa: PLE0604 all keys of the table above are strings


def __getattr__(name: str) -> object:
    """Imports the module of a public name when the name is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public names: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_keras()
