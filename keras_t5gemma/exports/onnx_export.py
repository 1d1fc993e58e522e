"""`export_onnx`: models for ONNX Runtime, written from their tensors, on each backend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_t5gemma.checkpoints.atomic_folder import check_space, new_folder
from keras_t5gemma.checkpoints.hugging_face.config import write_t5gemma_config
from keras_t5gemma.checkpoints.hugging_face.tokenizer import stop_ids, write_tokenizer
from keras_t5gemma.checkpoints.hugging_face.writer import write_json
from keras_t5gemma.checkpoints.tensor_source import TensorSource
from keras_t5gemma.config import BOS_ID, T5GemmaConfig, T5GemmaEncoderConfig
from keras_t5gemma.exports import onnx_stacks
from keras_t5gemma.exports.libraries import imported
from keras_t5gemma.exports.model_parts import Weights, write_from_weights
from keras_t5gemma.exports.onnx_graph import DATA_FILE, Graph, SharedWeights
from keras_t5gemma.exports.onnx_heads import check_head, head_graph

if TYPE_CHECKING:
    import keras

FUNCTION = "export_onnx"
ENCODER_FILE, DECODER_FILE, DECODER_WITH_PAST_FILE = (
    "encoder_model.onnx",
    "decoder_model.onnx",
    "decoder_with_past_model.onnx",
)
MODEL_FILE = "model.onnx"


def export_onnx(model: keras.Model, folder: str | os.PathLike[str]) -> None:
    """Writes a model for ONNX Runtime, which needs neither this package nor Keras.

    A language model becomes three graphs, with the files and names of Optimum and transformers.js:

        encoder_model            input_ids, attention_mask [B, S]                  -> last_hidden_state [B, S, E]
        decoder_model            input_ids [B, T], encoder_hidden_states,
                                 encoder_attention_mask                            -> logits [B, T, V], present.*
        decoder_with_past_model  input_ids [B, T], encoder_attention_mask,
                                 past_key_values.*                                 -> logits [B, T, V], present.*

    `present.{i}.decoder.key`, `.value` and `present.{i}.encoder.key`, `.value` are the caches of layer i, [B, K,
    positions, H]; the next step reads them as `past_key_values.{i}...`. The encoder's do not change, so
    `decoder_with_past_model` does not return them. Ids and masks are int64. Prompts of the decoder have no padding.

    A classifier becomes `model.onnx`, from `input_ids` and `attention_mask` to `logits`; a `T5GemmaTextEmbedder` to
    `sentence_embedding`; a `T5GemmaEncoder` to `last_hidden_state`.

    All graphs share the file `model.onnx_data`. Numbers are float32, whatever the model's dtype. LoRA is merged. The
    folder also has `config.json`, `generation_config.json` and the tokenizer's files, as Hugging Face's folders do.

    Args:
        model: a `T5GemmaSeq2SeqLM`, a classifier on the encoder, a `T5GemmaTextEmbedder` or a `T5GemmaEncoder`.
        folder: the path to create. It appears when it is complete; an existing folder is refused.

    Raises:
        ImportError: if the package `onnx` is not installed; the message names the extra.
        TypeError: if `model` is another one, such as the folder.
        ValueError: if the model is quantized, or a classifier's head is on the decoder.
        CheckpointError: if the folder exists, the disk is full, a weight is not finite, or `config.json` cannot express
            the model.
        RuntimeError: if another thread trains the model.
    """
    config = getattr(getattr(model, "backbone", model), "config", None)
    generates = hasattr(model, "generate")
    is_known = isinstance(config, T5GemmaConfig) if generates else isinstance(config, T5GemmaEncoderConfig)
    if not is_known and not hasattr(model, "num_classes"):
        raise TypeError(
            f"`model` must be a T5GemmaSeq2SeqLM, a classifier, a T5GemmaTextEmbedder or a T5GemmaEncoder, and comes "
            f"before the folder: {FUNCTION}(model, folder). Received: {model!r}."
        )
    check_head(model)
    imported("onnx", FUNCTION, "onnx")
    preprocessor = getattr(model, "preprocessor", None)
    proto = getattr(getattr(preprocessor, "tokenizer", None), "proto", None)
    chat = bool(getattr(preprocessor, "chat", False))
    ends = stop_ids(proto, chat)
    hf_config = write_t5gemma_config(config, "float32", ends)
    if hasattr(model, "num_classes"):
        names = model.labels or [f"LABEL_{i}" for i in range(model.num_classes)]
        hf_config["architectures"] = [model.ARCHITECTURE]
        hf_config["id2label"] = {str(i): name for i, name in enumerate(names)}
        hf_config["label2id"] = {name: i for i, name in enumerate(names)}

    def write(source: TensorSource) -> None:
        """Writes the folder, on one process."""
        with new_folder(folder) as partial:
            check_space(partial, sum(4 * source.nbytes(n) // source.dtype(n).itemsize for n in source.names()))
            write_json(partial / "config.json", hf_config)
            if proto is not None:
                write_tokenizer(partial, proto, chat, config.vocabulary_size)
            shared = SharedWeights(partial / DATA_FILE, Weights(source, config))
            if generates:
                special = {name: hf_config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
                write_json(partial / "generation_config.json", {**special, "decoder_start_token_id": BOS_ID})
                _save(_encoder_model(Graph(shared), config), partial / ENCODER_FILE)
                _save(_decoder_model(Graph(shared), config, with_past=False), partial / DECODER_FILE)
                _save(_decoder_model(Graph(shared), config, with_past=True), partial / DECODER_WITH_PAST_FILE)
            else:
                _save(head_graph(Graph(shared), model), partial / MODEL_FILE)

    write_from_weights(model, FUNCTION, write)


def _encoder_model(graph: Graph, config: T5GemmaConfig) -> Any:
    ids, mask = (graph.input(name, "int64", "batch", "encoder_length") for name in ("input_ids", "attention_mask"))
    x = onnx_stacks.encoder(graph, config.encoder, ids, mask, config.encoder_attention == "causal")
    graph.output(x, "last_hidden_state", "float32", "batch", "encoder_length", config.encoder.hidden_dim)
    return graph.model("encoder")


def _decoder_model(graph: Graph, config: T5GemmaConfig, with_past: bool) -> Any:
    stack = config.decoder
    ids = graph.input("input_ids", "int64", "batch", "decoder_length")
    mask = graph.input("encoder_attention_mask", "int64", "batch", "encoder_length")
    output, past = None, None

    def names(prefix: str, i: int, kind: str) -> list[str]:
        return [f"{prefix}.{i}.{kind}.{part}" for part in ("key", "value")]

    def shape(length: str) -> tuple[int | str, ...]:
        return "batch", stack.num_key_value_heads, length, stack.head_dim

    if with_past:
        lengths = {"decoder": "past_length", "encoder": "encoder_length"}
        past = [
            {
                kind: [graph.input(name, "float32", *shape(length)) for name in names("past_key_values", i, kind)]
                for kind, length in lengths.items()
            }
            for i in range(stack.num_layers)
        ]
    else:
        width = config.encoder.hidden_dim
        output = graph.input("encoder_hidden_states", "float32", "batch", "encoder_length", width)
    x, present = onnx_stacks.decoder(graph, config, ids, mask, output, past)
    found = onnx_stacks.logits(graph, config, x)
    graph.output(found, "logits", "float32", "batch", "decoder_length", config.vocabulary_size)
    lengths = {"decoder": "total_length", "encoder": "encoder_length"}
    for i, caches in enumerate(present):
        for kind in ("decoder",) if with_past else ("decoder", "encoder"):
            for name, result in zip(names("present", i, kind), caches[kind], strict=True):
                graph.output(result, name, "float32", *shape(lengths[kind]))
    return graph.model("decoder_with_past" if with_past else "decoder")


def _save(model: Any, path: Path) -> None:
    """Writes a graph whose weights are in a file beside it, after ONNX's own check of it."""
    import onnx

    onnx.save_model(model, path)
    onnx.checker.check_model(str(path))
