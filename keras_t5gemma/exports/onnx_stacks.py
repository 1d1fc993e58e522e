"""The two stacks as ONNX operators: the encoder, and the decoder with the growing caches of Optimum's layout."""

from __future__ import annotations

import numpy as np

from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.exports import onnx_layers as layers
from keras_t5gemma.exports.onnx_graph import Graph


def encoder(graph: Graph, stack: StackConfig, ids: str, mask: str, causal: bool) -> str:
    """The encoder's output [B, S, D] for ids and mask, int64 [B, S]."""
    positions = layers.arange(graph, layers.size(graph, ids, 1))
    distance = _distance(graph, positions, positions)
    masks = {
        kind: layers.padding_mask(graph, mask, mask, distance, causal=causal, window=_window(stack, kind))
        for kind in set(stack.layer_kinds)
    }
    angles = layers.rotary_angles(graph, positions, stack)
    x = embedded(graph, stack, ids, "encoder")
    for i, kind in enumerate(stack.layer_kinds):
        path = f"encoder/layer_{i}"

        def attend(normed, kind=kind, path=f"{path}/self_attention"):
            key, value = layers.keys_values(graph, normed, path, stack, angles)
            return layers.attention(graph, normed, key, value, masks[kind], path, stack, angles)

        x = _residual(graph, x, path, "self_attention", stack, attend)
        x = _feed_forward(graph, x, path, stack)
    return layers.norm(graph, x, "encoder/final_norm", stack.norm_epsilon)


def decoder(
    graph: Graph,
    config: T5GemmaConfig,
    ids: str,
    encoder_mask: str,
    encoder_output: str | None,
    past: list[dict[str, list[str]]] | None,
) -> tuple[str, list[dict[str, list[str]]]]:
    """The decoder's output for the next tokens.

    Args:
        graph: the graph.
        config: the model's config.
        ids: int64 [B, T], tokens without padding.
        encoder_mask: int64 [B, S].
        encoder_output: [B, S, E], or None with caches.
        past: per layer `{"decoder": [key, value], "encoder": [key, value]}`, or None.

    Returns:
        `(x, present)`: [B, T, D], and the caches with the new tokens.
    """
    stack = config.decoder
    before = None if past is None else layers.size(graph, past[0]["decoder"][0], 2)
    length = layers.size(graph, ids, 1)
    positions = layers.arange(graph, length, before)
    everything = positions if before is None else layers.arange(graph, graph.op("Add", before, length))
    distance = _distance(graph, positions, everything)
    masks = {}
    for kind in set(stack.layer_kinds):
        visible = layers.near(graph, distance, causal=True, window=_window(stack, kind))
        bias = graph.op("Where", visible, 0.0, layers.HIDDEN)
        masks[kind] = layers.Mask(graph.op("Unsqueeze", bias, [0, 1, 2]))
    cross_mask = layers.padding_mask(graph, encoder_mask, None, None)
    angles = layers.rotary_angles(graph, positions, stack)
    x, present = embedded(graph, stack, ids, "decoder"), []
    for i, kind in enumerate(stack.layer_kinds):
        path, caches = f"decoder/layer_{i}", {}

        def attend(normed, i=i, kind=kind, path=f"{path}/self_attention", caches=caches):
            found = layers.keys_values(graph, normed, path, stack, angles)
            if past is not None:
                pairs = zip(past[i]["decoder"], found, strict=True)
                found = [graph.op("Concat", old, new, axis=2) for old, new in pairs]
            caches["decoder"] = found
            return layers.attention(graph, normed, *found, masks[kind], path, stack, angles)

        def attend_to_encoder(normed, i=i, path=f"{path}/cross_attention", caches=caches):
            if past is not None:
                found = past[i]["encoder"]
            else:
                found = layers.keys_values(graph, encoder_output, path, stack, None)
            caches["encoder"] = found
            return layers.attention(graph, normed, *found, cross_mask, path, stack, None)

        x = _residual(graph, x, path, "self_attention", stack, attend)
        x = _residual(graph, x, path, "cross_attention", stack, attend_to_encoder)
        x = _feed_forward(graph, x, path, stack)
        present.append(caches)
    return layers.norm(graph, x, "decoder/final_norm", stack.norm_epsilon), present


def logits(graph: Graph, config: T5GemmaConfig, x: str) -> str:
    """The capped logits [B, T, V] of the decoder's output [B, T, D]."""
    untied = "decoder/token_embedding/reverse_embeddings"
    if untied in graph.shared:
        found = graph.op("MatMul", x, graph.weight(untied))
    else:
        # Gemm takes the table as it is; a transposed copy would take its memory again.
        rows = graph.op("Reshape", x, [-1, config.decoder.hidden_dim])
        rows = graph.op("Gemm", rows, graph.weight("decoder/token_embedding/embeddings"), transB=1)
        sizes = graph.op("Slice", graph.op("Shape", x), [0], [2])
        found = graph.op("Reshape", rows, graph.op("Concat", sizes, [config.vocabulary_size], axis=0))
    return layers.soft_cap(graph, found, config.final_logit_soft_cap)


def embedded(graph: Graph, stack: StackConfig, ids: str, name: str) -> str:
    """The scaled embeddings [B, T, D] of ids [B, T]."""
    rows = graph.op("Gather", graph.weight(f"{name}/token_embedding/embeddings"), ids)
    return graph.op("Mul", rows, float(np.float32(stack.hidden_dim**0.5)))


def _window(stack: StackConfig, kind: str) -> int | None:
    return stack.sliding_window if kind == "sliding" else None


def _distance(graph: Graph, queries: str, keys: str) -> str:
    """Positions of queries [T] minus positions of keys [S]: int64 [T, S]."""
    return graph.op("Sub", graph.op("Unsqueeze", queries, [1]), graph.op("Unsqueeze", keys, [0]))


def _residual(graph: Graph, x: str, path: str, name: str, stack: StackConfig, call) -> str:
    """`x + post_norm(call(pre_norm(x)))`."""
    result = call(layers.norm(graph, x, f"{path}/pre_{name}_norm", stack.norm_epsilon))
    return graph.op("Add", x, layers.norm(graph, result, f"{path}/post_{name}_norm", stack.norm_epsilon))


def _feed_forward(graph: Graph, x: str, path: str, stack: StackConfig) -> str:
    """The residual of the feed-forward."""

    def call(normed):
        return layers.feed_forward(graph, normed, f"{path}/feed_forward")

    return _residual(graph, x, path, "feed_forward", stack, call)
