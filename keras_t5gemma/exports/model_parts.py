"""What every export reads of a model: config, tensors, tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_t5gemma.checkpoints.hugging_face.export import ModelTensors
from keras_t5gemma.checkpoints.processes import write_on_first
from keras_t5gemma.checkpoints.tensor_source import TensorSource, check_finite, flat_pieces
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.concurrency import reading
from keras_t5gemma.config import T5GemmaConfig, T5GemmaEncoderConfig


@dataclasses.dataclass(frozen=True)
class LanguageModelParts:
    """What an export reads of a language model besides its tensors.

    Attributes:
        config: the `T5GemmaConfig`.
        proto: the tokenizer's SentencePiece model, bytes.
        chat: whether prompts are read in Gemma's turns.
    """

    config: T5GemmaConfig
    proto: bytes
    chat: bool


class Weights:
    """The tensors of a model by the paths of its Keras variables, read one at a time.

    Args:
        source: a `TensorSource` with Hugging Face's names.
        config: the model's config.
    """

    def __init__(self, source: TensorSource, config: T5GemmaConfig | T5GemmaEncoderConfig):
        self._source = source
        self._specs = {tensor.path: tensor for tensor in tensor_specs(config)}

    def __contains__(self, path: str) -> bool:
        return path in self._specs

    def stored(self, path: str) -> np.ndarray:
        """A tensor in Hugging Face's layout: the kernel of a linear layer is [out, in].

        Raises:
            CheckpointError: if it holds infinities or NaNs.
        """
        name = self._specs[path].name
        array = self._source.read(name)
        for piece in flat_pieces(array):
            check_finite(self._source, name, piece)
        return array

    def kernel(self, path: str) -> np.ndarray:
        """A tensor in our layout: the kernel of a linear layer is [in, out]. Raises as `stored`."""
        return self._specs[path].from_stored(self.stored(path))


def check_language_model(lm: Any, function: str) -> None:
    """Checks that a model is a language model with both stacks.

    Args:
        lm: what the user passed.
        function: the name of the export, for errors.

    Raises:
        TypeError: if it is not.
    """
    config = getattr(getattr(lm, "backbone", None), "config", None)
    if not isinstance(config, T5GemmaConfig) or not hasattr(lm, "generate"):
        raise TypeError(
            f"`lm` must be a T5GemmaSeq2SeqLM, and comes before the folder: {function}(lm, folder). Received: {lm!r}."
        )


def language_model_parts(lm: Any, function: str) -> LanguageModelParts:
    """Checks a language model and its preprocessor.

    Args:
        lm: what the user passed.
        function: the name of the export, for errors.

    Raises:
        TypeError: if it is not a language model.
        ValueError: if it has no preprocessor, or its tokenizer has no SentencePiece model.
    """
    check_language_model(lm, function)
    proto = getattr(getattr(lm.preprocessor, "tokenizer", None), "proto", None)
    if not isinstance(proto, bytes):
        raise ValueError(
            f"{function} writes the vocabulary, and `lm` has no preprocessor with a tokenizer. Build the model as "
            f"T5GemmaSeq2SeqLM(backbone, preprocessor). Received: preprocessor={lm.preprocessor!r}."
        )
    return LanguageModelParts(lm.backbone.config, proto, bool(lm.preprocessor.chat))


def write_from_weights(model: Any, function: str, write: Callable[[TensorSource], None]) -> None:
    """Calls `write` with a model's tensors, on one process, while no other thread changes them.

    Raises:
        ValueError: if the model is quantized.
        RuntimeError: if another thread trains it.
    """
    backbone = getattr(model, "backbone", model)
    with reading(model, function):
        write_on_first(ModelTensors(backbone), backbone.weights, write)
