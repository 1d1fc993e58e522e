"""Tables of embeddings in int8 and int4, of which only the rows in use become floating-point numbers.

Keras's own layer quantizes a table as a whole, through several copies in float32; it unpacks an int4 table as a whole
for each lookup, and turns either table as a whole into int32 or floating-point numbers for each product with it: of a
table of 256,000 x 512 half a gigabyte a copy, and a token.
"""

import keras
from keras import ops

from keras_t5gemma.kernels.device import on_cpu

# Rows of a table that are floating-point numbers at a time. Caches like few; loops cost least on JAX.
_BLOCK_ROWS = {"jax": 1024, "tensorflow": 8192, "torch": 16384}


def int4_rows(embedding, token_ids):
    """[B, T, D] of ids [B, T] and a `keras.layers.ReversibleEmbedding` in int4."""
    return _unpacked(embedding, *(ops.take(x, token_ids, axis=0) for x in _int4_arrays(embedding)))


def has_block_product(embedding, x):
    """Whether to use `product_by_blocks` for this layer and x: on CPUs, which have no fast product with int8."""
    is_plain = embedding.tie_weights and not embedding.lora_enabled
    mode = embedding.quantization_mode
    as_is = mode == "int8" or (mode == "int4" and embedding.inputs_quantizer is None)
    return as_is and is_plain and on_cpu(x)


def product_by_blocks(product, x, embedding):
    """Float32 [B, T, V] of x [B, T, D] and a tied table [V, D] in int8 or int4, some rows of it at a time.

    Args:
        product: x and a floating-point table [v, D] to [B, T, v].
        x: in the compute dtype.
        embedding: the `keras.layers.ReversibleEmbedding`.
    """
    if embedding.quantization_mode == "int4":
        return _by_blocks(lambda *rows: product(x, _unpacked(embedding, *rows)), *_int4_arrays(embedding))
    logits = _by_blocks(lambda rows: product(x, ops.cast(rows, x.dtype)), embedding.embeddings)
    return logits / embedding.embeddings_scale  # by which rows were multiplied


def _by_blocks(logits_of, *arrays):
    """Float32 [B, T, V] of a function of some rows of arrays [V, ...], which gives [B, T, v]."""
    count, backend = arrays[0].shape[0], keras.config.backend()
    rows = min(count, _BLOCK_ROWS[backend])
    if backend == "torch":
        blocks = [logits_of(*(x[i : i + rows] for x in arrays)) for i in range(0, count, rows)]
        return ops.cast(ops.concatenate(blocks, axis=-1), "float32")
    whole = count // rows * rows
    blocks = ops.map(lambda xs: logits_of(*xs), tuple(ops.reshape(x[:whole], (-1, rows, *x.shape[1:])) for x in arrays))
    blocks = ops.reshape(ops.transpose(blocks, (1, 2, 0, 3)), (*ops.shape(blocks)[1:3], whole))
    if whole < count:
        blocks = ops.concatenate([blocks, logits_of(*(x[whole:] for x in arrays))], axis=-1)
    return ops.cast(blocks, "float32")


def _int4_arrays(embedding):
    """What is kept of each row: two numbers a byte [V, D / 2]; the scale; in blocks of inputs the zeros, too."""
    arrays = embedding._embeddings, embedding.embeddings_scale
    return arrays if _is_by_row(embedding) else (*arrays, embedding.embeddings_zero)


def _unpacked(embedding, packed, scale, zero=None):
    """Rows [..., D] in the compute dtype of `_int4_arrays`' rows."""
    # The first of two numbers is in the lower half of a byte, as a number of 4 bits with a sign.
    low = ops.subtract(ops.bitwise_xor(ops.bitwise_and(packed, 15), 8), 8)
    pairs = ops.stack([low, ops.right_shift(packed, 4)], axis=-1)
    width = embedding.output_dim
    rows = ops.reshape(pairs, (*ops.shape(packed)[:-1], 2 * packed.shape[-1]))[..., :width]
    rows = ops.cast(rows, embedding.compute_dtype)
    if _is_by_row(embedding):
        return rows / ops.cast(ops.expand_dims(scale, -1), rows.dtype)
    scale, zero = (_for_each_input(embedding, x, rows.dtype) for x in (scale, zero))
    return (rows - zero) * scale


def _is_by_row(embedding):
    return embedding._int4_block_size in (None, -1)


def _for_each_input(embedding, x, dtype):
    """[..., D] of a number [..., D / block] for each block of inputs."""
    return ops.repeat(ops.cast(x, dtype), embedding._int4_block_size, axis=-1)[..., : embedding.output_dim]
