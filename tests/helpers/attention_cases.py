"""Cases of attention for long sequences, each computed in some other way and plainly, gradients included."""

import functools

import keras
import numpy as np
from keras import ops

from keras_t5gemma.kernels.attention.masks import BlockMask, attention_mask
from keras_t5gemma.kernels.attention.reference import attend

KINDS = ("queries", "keys")
BATCH, KV_HEADS, GROUPS, SIZE = 2, 2, 3, 4
# Packed from three examples, with padding on the left of one row and on the right of the other.
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0, 0]], "int32")
OTHERS = np.array([[1, 1, 1, 1, 3, 3, 3], [0, 2, 2, 2, 2, 2, 0]], "int32")  # no 2 in one row, no 1 in the other

# Block of 4: 13 queries are three blocks and one query more.
CASES = {
    "all keys": {},
    "no later keys, no soft cap": {"causal": True, "cap": None},
    "a window shorter than a block": {"window": 2},
    "a causal window of several blocks": {"window": 5, "causal": True, "block": 2},
    "a window wider than the sequence, blocks of one query": {"window": 20, "block": 1},
    "more queries than keys": {"keys": OTHERS},
    "keys of its segment out of a query's sight": {"keys": OTHERS, "causal": True, "window": 2},
    "more keys than queries": {"queries": OTHERS, "keys": SEGMENTS},
    "queries within a cache": {"queries": SEGMENTS[:, 4:10], "keys": SEGMENTS, "start": 4, "causal": True, "window": 3},
    "bfloat16": {"dtype": "bfloat16", "window": 2},
    "float16, out of its range": {"dtype": "float16", "window": 2, "scale": 200.0},
}


def inputs(queries, keys, dtype, scale, size=SIZE):
    """Query, key, value and the weights of a sum of the output, which makes a gradient."""
    generator = np.random.default_rng(0)
    shapes = [(queries, KV_HEADS, GROUPS, size), (keys, KV_HEADS, size), (keys, KV_HEADS, size)]
    arrays = [scale * generator.standard_normal((BATCH, *shape)) for shape in (*shapes, shapes[0])]
    arrays[2:] = [array / scale for array in arrays[2:]]
    if dtype == "float16":
        # The terms of a product have one sign. Where sums leave the range on the way and come back, the result depends
        # on the processor: some sum in float16, others in float32.
        arrays[0] = np.abs(arrays[0])
        arrays[0][:, :, :, 1:] *= 1e-4  # these heads stay within the range, so that there are gradients
        arrays[1] = np.abs(arrays[1]) * np.sign(arrays[1][..., :1])
    arrays[1:3] = [array.swapaxes(1, 2) for array in arrays[1:3]]
    return [ops.cast(ops.convert_to_tensor(array.astype("float32")), dtype) for array in arrays]


def output_and_gradients(attention, query, key, value, upstream):
    """float32 arrays: what attention gives, and the gradients of its product with `upstream`."""
    tensors = (query, key, value)
    if keras.config.backend() == "jax":
        import jax

        @jax.jit
        def run(*tensors):
            output, backward = jax.vjp(attention, *tensors)
            return output, *backward(upstream)

        results = run(*tensors)
    elif keras.config.backend() == "torch":
        for tensor in tensors:
            tensor.requires_grad_()
        output = attention(*tensors)
        output.backward(upstream)
        results = output, *(tensor.grad for tensor in tensors)
    else:
        import tensorflow as tf

        @tf.function
        def run(*tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                output = attention(*tensors)
            return output, *tape.gradient(output, tensors, upstream)

        results = run(*tensors)
    return [ops.convert_to_numpy(ops.cast(result, "float32")) for result in results]


def both(case, attention, gradients=True):
    """What `attention` and the plain one give for a case, each the output and three gradients.

    Args:
        case: one of `CASES`.
        attention: `(query, key, value, mask, cap, dtype) -> output`, of a `BlockMask`.
        gradients: whether it has any.
    """
    case = {"queries": SEGMENTS, "keys": SEGMENTS, "block": 4, "dtype": "float32", "scale": 3.0, "cap": 2.0, **case}
    start = case.get("start", 0)
    # In a compiled decoding step it is a tensor.
    start = start and ops.convert_to_tensor(start)
    kind = {"query_start": start, "causal": case.get("causal", False), "window": case.get("window")}
    # Each position so many times over.
    segments = [ops.convert_to_tensor(np.repeat(case[name], case.get("times", 1), axis=1)) for name in KINDS]
    tensors = inputs(*(s.shape[1] for s in segments), case["dtype"], case["scale"], case.get("size", SIZE))
    plain = functools.partial(attend, cap=case["cap"], dtype=case["dtype"])
    whole, blocks = attention_mask(*segments, **kind), BlockMask(case["block"], *segments, **kind)
    if gradients:
        found = output_and_gradients(lambda *qkv: attention(*qkv, blocks, case["cap"], case["dtype"]), *tensors)
    else:
        output = attention(*tensors[:3], blocks, case["cap"], case["dtype"])
        found = [ops.convert_to_numpy(ops.cast(output, "float32"))]
    return found, output_and_gradients(lambda *qkv: plain(*qkv, whole), *map(ops.stop_gradient, tensors))
