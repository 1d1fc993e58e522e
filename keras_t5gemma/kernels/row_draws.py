"""Random choices of rows that each have a seed of their own."""

import keras
from keras import ops


def draw_per_row(logits, starts, counts, sizes):
    """Draws one column per row, as `keras.random.categorical` draws for a batch of that row alone.

    A row's draw depends on its logits, its seed and its size, not on the other rows. It is the draw number `count` of a
    `keras.random.SeedGenerator` whose state began with `start`.

    Args:
        logits: float32 [B, C], -inf for columns that are not to be drawn.
        starts: int [B], the first numbers of the generators' states, from 0 and below 2^30.
        counts: int [B], how many draws each generator has made, from 0.
        sizes: int [B], the number of columns of each row's own batch; more than C if columns with -inf were left out at
            the end, fewer if there are some at the end that it does not have. 0 for a row whose draw is not needed.
            PyTorch's draws depend on it. JAX's and TensorFlow's do not, except for TensorFlow's under XLA and on a GPU.

    Returns:
        int32 [B].
    """
    backend = keras.config.backend()
    return {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[backend](logits, starts, counts, sizes)


def _jax(logits, starts, counts, _):
    import jax

    def draw(key, row):
        # The number of an element alone determines its noise, so further columns with -inf change nothing.
        return jax.random.categorical(key, row[None, :, None], axis=1, shape=(1, 1))[0, 0]

    return jax.vmap(draw)(ops.cast(ops.stack([starts, counts], axis=1), "uint32"), logits).astype("int32")


def _tensorflow(logits, starts, counts, _):
    import tensorflow as tf

    def draw(arguments):
        row, seed = arguments
        return tf.random.stateless_categorical(row[None], 1, seed=seed, dtype=tf.int32)[0, 0]

    return tf.map_fn(draw, (logits, tf.stack([starts, counts], axis=1)), fn_output_signature=tf.int32)


def _torch(logits, starts, counts, sizes):
    import torch

    drawn = torch.zeros_like(starts)
    generator = torch.Generator(device=logits.device)
    # One transfer for all rows: a generator takes its seed from Python.
    for row, (start, count, size) in enumerate(torch.stack([starts, counts, sizes], dim=1).tolist()):
        if size:
            generator.manual_seed((start + count) & 0xFFFFFFFF)
            chances = torch.softmax(logits[row : row + 1, :size], dim=-1)
            chances = torch.nn.functional.pad(chances, (0, size - chances.shape[1]))
            drawn[row] = torch.multinomial(chances, 1, replacement=True, generator=generator)[0, 0]
    return drawn
