"""The layers of a block as ONNX operators: norms, RoPE, attention, feed-forward, masks.

They compute what `layers/` computes, in float32. Shapes are those of the docstrings there.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from keras_t5gemma.config import StackConfig
from keras_t5gemma.exports.onnx_graph import Graph

# Added to the logits of hidden keys. Finite, so that a query that sees no key is no NaN.
HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Mask:
    """The visible keys of one kind of layer, as results of the graph.

    Attributes:
        bias: what is added to logits, [B, 1, 1, T, S] or [1, 1, 1, T, S].
        sees_any: float32 [B, 1, 1, T, 1], 0 for a query that sees no key; None if there are none.
    """

    bias: str
    sees_any: str | None = None


def norm(graph: Graph, x: str, path: str, epsilon: float) -> str:
    """RMSNorm of x [..., D]."""
    mean = graph.op("ReduceMean", graph.op("Mul", x, x), [-1], keepdims=1)
    normed = graph.op("Div", x, graph.op("Sqrt", graph.op("Add", mean, epsilon)))
    return graph.op("Mul", normed, graph.shared.scale(path))


def soft_cap(graph: Graph, x: str, cap: float | None) -> str:
    """`cap * tanh(x / cap)`, or x if there is no cap."""
    return x if cap is None else graph.op("Mul", graph.op("Tanh", graph.op("Div", x, float(cap))), float(cap))


def feed_forward(graph: Graph, x: str, path: str) -> str:
    """The gated feed-forward of x [B, T, D]."""
    gate, up = (graph.op("MatMul", x, graph.weight(f"{path}/{name}/kernel")) for name in ("gate", "up"))
    gated = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), up)
    return graph.op("MatMul", gated, graph.weight(f"{path}/down/kernel"))


def arange(graph: Graph, length: str, start: str | None = None) -> str:
    """int64 [length]: `start`, `start + 1`, ..."""
    first = graph.constant(np.int64(0)) if start is None else start
    end = length if start is None else graph.op("Add", start, length)
    return graph.op("Range", first, end, graph.constant(np.int64(1)))


def size(graph: Graph, x: str, axis: int) -> str:
    """The size of an axis, an int64 scalar."""
    return graph.op("Gather", graph.op("Shape", x), graph.constant(np.int64(axis)))


def rotary_angles(graph: Graph, positions: str, stack: StackConfig) -> tuple[str, str]:
    """Cosines and sines [T, H / 2] of positions [T]."""
    size = stack.head_dim
    frequencies = stack.rope_wavelength ** -(np.arange(0, size, 2, dtype="float32") / size)
    column = graph.op("Unsqueeze", graph.op("Cast", positions, to=1), [1])
    angles = graph.op("Mul", column, frequencies[None].astype("float32"))
    return graph.op("Cos", angles), graph.op("Sin", angles)


def rotate(graph: Graph, x: str, angles: tuple[str, str]) -> str:
    """Rotates the halves of x [B, heads, T, H]."""
    cos, sin = angles
    first, second = graph.ops("Split", 2, x, axis=-1, num_outputs=2)
    left = graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin))
    right = graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin))
    return graph.op("Concat", left, right, axis=-1)


def heads(graph: Graph, x: str, path: str, count: int, head_size: int, angles: tuple[str, str] | None) -> str:
    """Projects x [B, T, D] to heads [B, count, T, H]."""
    rows = graph.op("MatMul", x, graph.weight(f"{path}/kernel"))
    split = graph.op("Transpose", graph.op("Reshape", rows, [0, 0, count, head_size]), perm=[0, 2, 1, 3])
    return split if angles is None else rotate(graph, split, angles)


def keys_values(graph: Graph, x: str, path: str, stack: StackConfig, angles: tuple[str, str] | None) -> list[str]:
    """Keys and values [B, K, S, H] of x [B, S, D]."""
    count, head_size = stack.num_key_value_heads, stack.head_dim
    return [
        heads(graph, x, f"{path}/key", count, head_size, angles),
        heads(graph, x, f"{path}/value", count, head_size, None),
    ]


def attention(
    graph: Graph, x: str, key: str, value: str, mask: Mask, path: str, stack: StackConfig, angles: tuple | None
) -> str:
    """Attention of x [B, T, D] over keys and values [B, K, S, H]; returns [B, T, D]."""
    kv_heads, head_size = stack.num_key_value_heads, stack.head_dim
    groups = stack.num_query_heads // kv_heads
    query = heads(graph, x, f"{path}/query", stack.num_query_heads, head_size, angles)
    query = graph.op("Mul", query, float(stack.query_scale))
    # The G heads that share keys are rows of one product: [B, K, G T, H].
    query = graph.op("Reshape", query, [0, kv_heads, -1, head_size])
    logits = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
    length, keys = size(graph, x, 1), size(graph, key, 2)
    sizes = [graph.op("Unsqueeze", n, [0]) for n in (length, keys)]
    shape = graph.op("Concat", [0, 0], [groups], *sizes, axis=0)
    logits = graph.op("Reshape", logits, shape)  # [B, K, G, T, S]
    logits = graph.op("Add", soft_cap(graph, logits, stack.attention_soft_cap), mask.bias)
    weights = graph.op("Softmax", logits, axis=-1)
    if mask.sees_any is not None:
        weights = graph.op("Mul", weights, mask.sees_any)
    rows = graph.op("Reshape", weights, graph.op("Concat", [0, 0], [-1], sizes[1], axis=0))
    attended = graph.op("MatMul", rows, value)  # [B, K, G T, H]
    attended = graph.op("Reshape", attended, graph.op("Concat", [0], [stack.num_query_heads], sizes[0], [-1], axis=0))
    attended = graph.op("Transpose", attended, perm=[0, 2, 1, 3])
    attended = graph.op("Reshape", attended, [0, 0, stack.num_query_heads * head_size])
    return graph.op("MatMul", attended, graph.weight(f"{path}/output/kernel"))


def padding_mask(graph: Graph, keys: str, queries: str | None, distance: str | None, **kind) -> Mask:
    """The mask of keys [B, S] and queries [B, T], both int64 and 0 at padding; without queries none is padding.

    Args:
        graph: the graph.
        keys: int64 [B, S].
        queries: int64 [B, T] or None.
        distance: position of the query minus that of the key, int64 [T, S]; None if it does not matter.
        **kind: `causal` and `window` of `near`.
    """
    visible = graph.op("Unsqueeze", graph.op("Cast", keys, to=9), [1, 2, 3])  # bool [B, 1, 1, 1, S]
    if distance is not None and (near_keys := near(graph, distance, **kind)) is not None:
        visible = graph.op("And", visible, near_keys)
    if queries is not None:
        visible = graph.op("And", visible, graph.op("Unsqueeze", graph.op("Cast", queries, to=9), [1, 2, 4]))
    bias = graph.op("Where", visible, 0.0, HIDDEN)
    if queries is None:
        return Mask(bias)
    return Mask(bias, graph.op("ReduceMax", graph.op("Cast", visible, to=1), [-1], keepdims=1))


def near(graph: Graph, distance: str, causal: bool, window: int | None) -> str | None:
    """The pairs of positions that a layer connects, bool [T, S]; None for all."""
    conditions = []
    if causal:
        conditions.append(graph.op("GreaterOrEqual", distance, graph.constant(np.int64(0))))
    if window is not None:
        conditions.append(graph.op("Less", graph.op("Abs", distance), graph.constant(np.int64(window))))
    if len(conditions) == 2:
        return graph.op("And", *conditions)
    return conditions[0] if conditions else None
