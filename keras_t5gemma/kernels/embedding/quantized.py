"""Embedding tables in int8 and int4, of which only the rows in use are converted to floating point.

Keras's own layer quantizes a whole table at once, through several copies in float32. It unpacks a whole int4 table for
each lookup. For each product it converts a whole int8 or int4 table to int32 or floating point. For a table of 256,000
x 512 that is half a gigabyte per copy, and per token.
"""

import keras
from keras import ops

from keras_t5gemma.kernels.device import on_cpu

# Rows of a table that are in floating point at a time. Fewer rows suit the caches; loops cost least on JAX.
_BLOCK_ROWS = {"jax": 1024, "tensorflow": 8192, "torch": 16384}


def int4_rows(embedding, token_ids):
    """Looks up rows [B, T, D] by ids [B, T] in a `keras.layers.ReversibleEmbedding` in int4."""
    return _unpacked(embedding, *(ops.take(x, token_ids, axis=0) for x in _int4_arrays(embedding)))


def has_block_product(embedding, x) -> bool:
    """Whether to use `product_by_blocks` for this layer and x: on CPUs, which have no fast product with int8."""
    is_plain = embedding.tie_weights and not embedding.lora_enabled
    mode = embedding.quantization_mode
    quantizes_weights_only = mode == "int8" or (mode == "int4" and embedding.inputs_quantizer is None)
    return quantizes_weights_only and is_plain and on_cpu(x)


def product_by_blocks(product, x, embedding):
    """Logits from a tied table [V, D] in int8 or int4, a block of its rows at a time.

    Args:
        product: a function of x and a floating-point table [v, D] that returns [B, T, v].
        x: [B, T, D], in the compute dtype.
        embedding: the `keras.layers.ReversibleEmbedding`.

    Returns:
        float32 [B, T, V].
    """
    if embedding.quantization_mode == "int4":
        return _map_row_blocks(lambda *rows: product(x, _unpacked(embedding, *rows)), *_int4_arrays(embedding))
    logits = _map_row_blocks(lambda rows: product(x, ops.cast(rows, x.dtype)), embedding.embeddings)
    return logits / embedding.embeddings_scale  # quantization multiplied the rows by it


def _map_row_blocks(logits_of, *arrays):
    """Float32 [B, T, V] from a function of a block of rows.

    Args:
        logits_of: a function of blocks [v, ...] of each array that returns [B, T, v].
        *arrays: arrays with one row per piece of the vocabulary, [V, ...].
    """
    count, backend = arrays[0].shape[0], keras.config.backend()
    rows = min(count, _BLOCK_ROWS[backend])
    if backend == "torch":
        blocks = [logits_of(*(x[i : i + rows] for x in arrays)) for i in range(0, count, rows)]
        return ops.cast(ops.concatenate(blocks, axis=-1), "float32")
    even = count // rows * rows  # the rows that fill complete blocks
    blocks = ops.map(lambda xs: logits_of(*xs), tuple(ops.reshape(x[:even], (-1, rows, *x.shape[1:])) for x in arrays))
    blocks = ops.reshape(ops.transpose(blocks, (1, 2, 0, 3)), (*ops.shape(blocks)[1:3], even))
    if even < count:
        blocks = ops.concatenate([blocks, logits_of(*(x[even:] for x in arrays))], axis=-1)
    return ops.cast(blocks, "float32")


def _int4_arrays(embedding):
    """The arrays of an int4 table: two numbers per byte [V, D / 2], scales, and zeros if quantized in input blocks."""
    arrays = embedding._embeddings, embedding.embeddings_scale
    return arrays if _has_row_scales(embedding) else (*arrays, embedding.embeddings_zero)


def _unpacked(embedding, packed, scale, zero=None):
    """Rows [..., D] in the compute dtype, from rows of `_int4_arrays`."""
    # The lower half of a byte holds the first of two numbers, as a signed number of 4 bits.
    low = ops.subtract(ops.bitwise_xor(ops.bitwise_and(packed, 15), 8), 8)
    pairs = ops.stack([low, ops.right_shift(packed, 4)], axis=-1)
    width = embedding.output_dim
    rows = ops.reshape(pairs, (*ops.shape(packed)[:-1], 2 * packed.shape[-1]))[..., :width]
    rows = ops.cast(rows, embedding.compute_dtype)
    if _has_row_scales(embedding):
        return rows / ops.cast(ops.expand_dims(scale, -1), rows.dtype)
    scale, zero = (_repeat_per_input(embedding, x, rows.dtype) for x in (scale, zero))
    return (rows - zero) * scale


def _has_row_scales(embedding) -> bool:
    """Whether each row has one scale, rather than one per block of inputs."""
    return embedding._int4_block_size in (None, -1)


def _repeat_per_input(embedding, x, dtype):
    """Repeats numbers per block of inputs, [..., D / block], to one number per input, [..., D]."""
    return ops.repeat(ops.cast(x, dtype), embedding._int4_block_size, axis=-1)[..., : embedding.output_dim]
