"""Encodes one long input twice: `encode_long_input.py LENGTH DTYPE`.

Prints `[seconds of the first run, of the second, MiB of the model, peak MiB]`, memory above the import.
"""

import json
import sys
import time

import keras
import numpy as np
from process_memory import forget_peak, in_bytes

import keras_t5gemma as kt

kt.T5GemmaBackbone  # noqa: B018 imported now, not while it is measured


def runner(encoder, ids, mask):
    """`() -> output`, compiled on JAX and TensorFlow."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        groups = (encoder.trainable_variables, encoder.non_trainable_variables)
        values = [[variable.value for variable in group] for group in groups]
        compiled = jax.jit(lambda trainable, rest, *args: encoder.stateless_call(trainable, rest, *args)[0])
        return lambda: compiled(*values, ids, mask).block_until_ready()
    if backend == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(encoder)
        return lambda: compiled(tf.constant(ids), tf.constant(mask))
    import torch

    def run():
        with torch.no_grad():
            return encoder(torch.from_numpy(ids), torch.from_numpy(mask))

    return run


def main():
    length, dtype = int(sys.argv[1]), sys.argv[2]
    forget_peak()
    before = in_bytes("VmRSS")
    encoder = kt.T5GemmaBackbone("s", "s", dtype=dtype).encoder
    built = in_bytes("VmRSS") - before
    ids = np.random.default_rng(0).integers(3, 256_000, (1, length), dtype="int32")
    run = runner(encoder, ids, np.ones_like(ids))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        output = keras.ops.convert_to_numpy(keras.ops.cast(run(), "float32"))
        times.append(time.perf_counter() - start)
    assert np.isfinite(output).all()
    print(json.dumps([*times, built / 2**20, (in_bytes("VmHWM") - before) / 2**20]))


main()
