"""Exports a checkpoint or a model in memory to a folder that `transformers` loads with the same logits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_t5gemma._keras_internals import flatten_layers
from keras_t5gemma.checkpoints.atomic_folder import new_folder
from keras_t5gemma.checkpoints.hugging_face.config import write_t5gemma_config
from keras_t5gemma.checkpoints.hugging_face.heads import Head, WithHead, head_fields
from keras_t5gemma.checkpoints.hugging_face.model_card import model_card
from keras_t5gemma.checkpoints.hugging_face.modules import options_of, write_modules
from keras_t5gemma.checkpoints.hugging_face.tokenizer import stop_ids, write_tokenizer
from keras_t5gemma.checkpoints.hugging_face.writer import write_json, write_tensors
from keras_t5gemma.checkpoints.parts import as_saved_alone
from keras_t5gemma.checkpoints.processes import gathered, write_on_first
from keras_t5gemma.checkpoints.tensor_source import DTYPES, TensorSource
from keras_t5gemma.checkpoints.tensor_table import TensorSpec, tensor_specs
from keras_t5gemma.checkpoints.transforms import cast_tensors
from keras_t5gemma.concurrency import reading
from keras_t5gemma.config import BOS_ID, T5GemmaConfig, T5GemmaEncoderConfig
from keras_t5gemma.hub import PREPROCESSOR_FILE, PREPROCESSOR_OPTIONS

if TYPE_CHECKING:
    import keras
    import keras_hub


def export_to_hugging_face(
    model: keras.Model,
    folder: str | os.PathLike[str],
    *,
    tokenizer: keras_hub.tokenizers.SentencePieceTokenizer | None = None,
    chat: bool | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    allow_non_finite: bool = False,
) -> None:
    """Writes `config.json`, safetensors, `generation_config.json` (if it generates) and the tokenizer's files (if any).

    The preprocessor's lengths, `chat` and `truncate` are written to a file of their own. `from_preset` of this package
    reads it, other programs ignore it.

    The folder of a `T5GemmaTextEmbedder` also has the files by which
    `sentence_transformers.SentenceTransformer(folder)` gives the same vectors.

    LoRA is merged into the kernels. The encoder's `sliding_window` is written as in published checkpoints,
    `|q - k| < sliding_window`. `transformers` 5.23 then sees one key more on each side of the window (4.53 to 4.57 do
    not), in this checkpoint as in Google's. `transformers` has no causal encoder: a model with one is written under a
    model type that `transformers` refuses and `from_preset` of this package reads.

    A model whose weights are sharded over processes (JAX, `keras.distribution`) is exported by the same call on all of
    them: each tensor in turn is gathered, and the first process writes it. This also works in a callback of `fit`.

    Args:
        model: a `T5GemmaBackbone`; a `T5GemmaSeq2SeqLM`, whose preprocessor then gives `tokenizer` and `chat`; a
            `T5GemmaEncoder` or a `T5GemmaTextEmbedder`, for `transformers.T5GemmaEncoderModel`; or a classifier, for
            `T5GemmaForSequenceClassification` and `T5GemmaForTokenClassification`.
        folder: the path to create. It appears when it is complete; an existing folder is refused.
        tokenizer: a tokenizer with a SentencePiece `proto`, or `None`.
        chat: whether the model reads prompts in Gemma's turns. If so, their chat template is written, and
            `<end_of_turn>` is among the ids at which generation stops.
        dtype: "float32", "float16" or "bfloat16"; `None` for each variable's own, bit for bit.
        max_shard_size: bytes per file, an int or a text such as "5GB".
        allow_non_finite: whether weights may be infinities and NaNs; otherwise they are refused by name.

    Raises:
        TypeError: if the folder is passed before the model.
        ValueError: if the model is quantized, or an argument is invalid; or if an embedder has no tokenizer, or reads
            its texts in Gemma's turns, which sentence-transformers does not do.
        CheckpointError: if the folder exists, a `query_scalar` is not a whole number (`transformers` reads no others),
            or a weight does not fit in float16 or is not finite.
        RuntimeError: if another thread trains the model.
    """
    if isinstance(model, (str, Path)):
        raise TypeError(f"`model` comes before `folder`: export_to_hugging_face(model, folder). Received: {model!r}.")
    backbone: Any = getattr(model, "backbone", model)  # A `T5GemmaBackbone`: `keras.Model` has no `config`.
    head, head_options = model.hugging_face_head() if hasattr(model, "hugging_face_head") else (None, None)
    preprocessor = getattr(model, "preprocessor", None)
    tokenizer = getattr(preprocessor, "tokenizer", None) if tokenizer is None else tokenizer
    chat = bool(getattr(preprocessor, "chat", False)) if chat is None else chat
    options = {name: getattr(preprocessor, name) for name in PREPROCESSOR_OPTIONS if hasattr(preprocessor, name)}
    options = {**options, "chat": chat} if options and head is None else head_options
    proto = None if tokenizer is None else tokenizer.proto
    if tokenizer is not None and not isinstance(proto, bytes):
        raise ValueError(f"`tokenizer` must have its SentencePiece model as `proto`. Received: {tokenizer!r}.")

    embedder = options_of(model)
    if embedder is not None and (chat or proto is None):
        raise ValueError(
            f"sentence-transformers needs a tokenizer, and reads texts as they are. Pass a `preprocessor` to the "
            f"embedder, with chat=False; or export its `backbone`. Received: chat={chat}, tokenizer={tokenizer!r}."
        )

    def write(source: TensorSource) -> None:
        """Writes the folder from the model's tensors, on one process."""
        write_checkpoint(
            folder,
            backbone.config,
            cast_tensors(source if head is None else WithHead(source, head), dtype),
            head=head,
            proto=proto,
            chat=chat,
            preprocessor=options,
            embedder=embedder,
            max_shard_size=max_shard_size,
            allow_non_finite=allow_non_finite,
            card=model_card("A T5Gemma exported from Keras", {"model": backbone.name}),
        )

    with reading(model, "export_to_hugging_face"):
        write_on_first(ModelTensors(backbone), backbone.weights, write)


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: T5GemmaConfig | T5GemmaEncoderConfig,
    source: TensorSource,
    *,
    head: Head | None = None,
    proto: bytes | None = None,
    chat: bool = False,
    preprocessor: Mapping[str, Any] | None = None,
    embedder: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    allow_non_finite: bool = False,
    card: str | None = None,
) -> None:
    """Writes a complete Hugging Face folder, which appears under its name when it is complete.

    Args:
        folder: the path to create.
        config: the model's config; a `T5GemmaEncoderConfig` for an encoder alone.
        source: the model's tensors, under the names of Hugging Face's T5Gemma.
        head: a classifier's head, whose tensors the source has too; None for a model without one.
        proto: the tokenizer's SentencePiece model, bytes, or None.
        chat: whether the model reads prompts in Gemma's turns.
        preprocessor: the options of this package's preprocessor by name, or None.
        embedder: the options of a `T5GemmaTextEmbedder`, or None for other models.
        max_shard_size: bytes per file, an int or a text such as "5GB".
        allow_non_finite: whether tensors may hold infinities and NaNs.
        card: the text of the model card, or None.

    Raises:
        ValueError: if an argument is invalid.
        CheckpointError: as for `export_to_hugging_face`.
    """
    if chat and proto is None:
        raise ValueError("`chat=True` needs a `tokenizer`: Gemma's turns are tokens of its vocabulary.")
    # The dtype of the first tensor, an embedding, is written for all: a model has one dtype unless policies were mixed.
    dtype = str(source.dtype(source.names()[0]))
    generates = isinstance(config, T5GemmaConfig) and head is None
    hf_config = write_t5gemma_config(config, dtype, stop_ids(proto, chat))
    if head is not None:
        hf_config |= head_fields(head, isinstance(config, T5GemmaConfig))
    elif not generates:
        source = as_saved_alone(source)
    with new_folder(folder) as partial:
        write_json(partial / "config.json", hf_config)
        if generates:
            special = {name: hf_config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
            write_json(partial / "generation_config.json", {**special, "decoder_start_token_id": BOS_ID})
        if proto is not None:
            write_tokenizer(partial, proto, chat, config.vocabulary_size)
        if preprocessor:
            write_json(partial / PREPROCESSOR_FILE, preprocessor)
        if embedder:
            limits = preprocessor or {}
            write_modules(
                partial,
                **embedder,
                width=config.encoder.hidden_dim,
                truncate=limits.get("truncate"),
                max_length=limits.get("encoder_sequence_length"),
            )
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        write_tensors(
            partial, source, max_shard_size, allow_non_finite=allow_non_finite, title=f"Writing {Path(folder).name}"
        )


class ModelTensors(TensorSource):
    """The weights of a backbone as a `TensorSource` under Hugging Face's names, LoRA merged.

    Args:
        backbone: a `T5GemmaBackbone` or a `T5GemmaEncoder`.

    Raises:
        ValueError: if the backbone is quantized.
    """

    def __init__(self, backbone: Any):  # A `StackModel`, which this module may not import.
        dtypes = {str(dtype): dtype for dtype in DTYPES.values()}
        self._title = f"the model {backbone.name!r}"
        self._tensors = {tensor.name: tensor for tensor in tensor_specs(backbone.config)}
        # Layers by path, not variables: if LoRA is enabled, a layer's `kernel` has LoRA's product added, while the
        # variable of that path is the frozen weight. Keras has no public list of nested layers.
        self._layers = {layer.path: layer for layer in flatten_layers(backbone)}
        self._dtypes = {}
        for tensor in self._tensors.values():
            layer, _ = self._layer(tensor)
            if getattr(layer, "quantization_mode", None) is not None:
                raise ValueError(
                    f"{tensor.path} is quantized ({layer.quantization_mode}). A Hugging Face T5Gemma is not: "
                    f"export the model from before `quantize`, or keep this one with `save_to_preset`."
                )
            self._dtypes[tensor.name] = dtypes[layer.variable_dtype]

    def names(self) -> list[str]:
        """The names in a Hugging Face T5Gemma."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape as Hugging Face stores it."""
        return self._tensors[name].stored_shape

    def dtype(self, name: str) -> np.dtype:
        """The variable's dtype."""
        return self._dtypes[name]

    def read(self, name: str) -> np.ndarray:
        """The weight as a numpy array in Hugging Face's layout. If it is sharded, all processes must call this."""
        tensor = self._tensors[name]
        layer, attribute = self._layer(tensor)
        array = gathered(getattr(layer, attribute))
        # Keras may give a merged kernel in the compute dtype.
        return tensor.to_stored(array.astype(self._dtypes[name], copy=False))

    def where(self, name: str | None = None) -> str:
        """The model's name, and the variable's path."""
        return self._title if name is None else f"{self._title} ({self._tensors[name].path})"

    def _layer(self, tensor: TensorSpec) -> tuple[Any, str]:
        """The layer of a tensor, and the name of its attribute: "kernel", "embeddings" or "scale"."""
        path, _, attribute = tensor.path.rpartition("/")
        return self._layers[path], attribute
