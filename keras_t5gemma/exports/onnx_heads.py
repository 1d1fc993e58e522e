"""Classifiers and embedders as one ONNX graph: a stack, pooling and a head."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_t5gemma.exports import onnx_layers as layers
from keras_t5gemma.exports.onnx_graph import Graph
from keras_t5gemma.exports.onnx_stacks import encoder

_INTEGER, _FLOAT = 7, 1  # ONNX's numbers of int64 and float32


def check_head(model: Any) -> None:
    """Refuses models of which no graph is written.

    Raises:
        ValueError: if the head is on the decoder.
    """
    if getattr(model, "stack", "encoder") != "encoder":
        raise ValueError(
            f"`export_onnx` writes heads on the encoder. Received: a {type(model).__name__} with stack="
            f"{model.stack!r}. `export_to_hugging_face` writes it."
        )


def head_graph(graph: Graph, model: Any) -> Any:
    """The whole model: `input_ids` and `attention_mask` to `logits`, `sentence_embedding` or `last_hidden_state`.

    Args:
        graph: an empty graph.
        model: a classifier, a `T5GemmaTextEmbedder` or a `T5GemmaEncoder`.

    Returns:
        An `onnx.ModelProto`.
    """
    config = model.backbone.config if hasattr(model, "backbone") else model.config
    stack, causal = config.encoder, config.encoder_attention == "causal"
    ids = graph.input("input_ids", "int64", "batch", "length")
    mask = graph.input("attention_mask", "int64", "batch", "length")
    x = encoder(graph, stack, ids, mask, causal)
    pooling = getattr(model, "pooling", None)
    if not hasattr(model, "backbone"):
        graph.output(x, "last_hidden_state", "float32", "batch", "length", stack.hidden_dim)
    elif hasattr(model, "num_classes"):
        x = x if pooling is None else pooled(graph, x, mask, pooling)
        kernel, bias = (np.asarray(_array(v), "float32") for v in (model.head.kernel, model.head.bias))
        shape = ("batch",) if pooling is not None else ("batch", "length")
        found = graph.op("Add", graph.op("MatMul", x, kernel), bias)
        graph.output(found, "logits", "float32", *shape, model.num_classes)
    else:
        x = graph.op("Slice", pooled(graph, x, mask, pooling), [0], [model.dimensions], [1])
        if model.normalize:
            squares = graph.op("ReduceSum", graph.op("Mul", x, x), [-1], keepdims=1)
            x = graph.op("Div", x, graph.op("Sqrt", graph.op("Max", squares, 1e-24)))
        graph.output(x, "sentence_embedding", "float32", "batch", model.dimensions)
    return graph.model("t5gemma")


def pooled(graph: Graph, x: str, mask: str, pooling: str) -> str:
    """One vector [B, D] per text, from x [B, S, D] and its mask [B, S]: "mean" of its tokens, or the "last" one."""
    keep = graph.op("Cast", graph.op("Cast", mask, to=9), to=_INTEGER)
    if pooling == "mean":
        weights = graph.op("Cast", keep, to=_FLOAT)
        weights = graph.op("Div", weights, graph.op("Max", graph.op("ReduceSum", weights, [1], keepdims=1), 1.0))
    else:
        places = graph.op("Add", layers.arange(graph, layers.size(graph, mask, 1)), graph.constant(np.int64(1)))
        places = graph.op("Mul", keep, places)
        last = graph.op("Equal", places, graph.op("ReduceMax", places, [1], keepdims=1))
        weights = graph.op("Cast", graph.op("And", last, graph.op("Cast", keep, to=9)), to=_FLOAT)
    return graph.op("Squeeze", graph.op("MatMul", graph.op("Unsqueeze", weights, [1]), x), [1])


def _array(variable: Any) -> np.ndarray:
    import keras

    return keras.ops.convert_to_numpy(variable)
