"""Encoding long inputs with a Small-Small sized encoder: seconds and peak memory, by length and backend.

    python benchmarks/long_inputs.py
    python benchmarks/long_inputs.py --lengths 32768 --backends jax --dtype bfloat16
    python benchmarks/long_inputs.py --ways-in predict evaluate fit embed score --layers 2 --lengths 16384

Vocabulary 256,000, random weights and ids, one input without padding; compiled on JAX and TensorFlow, eager on PyTorch.
Each length runs in a process of its own. Seconds are those of the second run; memory is the peak above the bare import,
from building the model on, whose weights alone, of both stacks, take 1.25 GB in float32.

With `--ways-in`, the model as its users call it, vocabulary 32,000 and 16 target tokens, after calls of 64, 96 and 128
input tokens: memory is the peak above what they left. TensorFlow then runs what it traced for any length.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys

from rich.console import Console
from rich.table import Table

MEASURE = """
import json, sys, time
import numpy as np
import keras
import keras_t5gemma as kt
kt.T5GemmaBackbone
length, dtype = int(sys.argv[1]), sys.argv[2]
def memory(field):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
encoder = kt.T5GemmaBackbone("s", "s", dtype=dtype).encoder
built = memory("VmRSS") - before
ids = np.random.default_rng(0).integers(3, 256000, (1, length), dtype="int32")
mask = np.ones_like(ids)
backend = keras.config.backend()
if backend == "jax":
    import jax
    values = [[variable.value for variable in group] for group in
        (encoder.trainable_variables, encoder.non_trainable_variables)]
    compiled = jax.jit(lambda trainable, rest, *args: encoder.stateless_call(trainable, rest, *args)[0])
    run = lambda: compiled(*values, ids, mask).block_until_ready()
elif backend == "tensorflow":
    import tensorflow as tf
    compiled = tf.function(encoder)
    run = lambda: compiled(tf.constant(ids), tf.constant(mask))
else:
    import torch
    def run():
        with torch.no_grad():
            return encoder(torch.from_numpy(ids), torch.from_numpy(mask))
times = []
for _ in range(2):
    start = time.perf_counter()
    output = keras.ops.convert_to_numpy(keras.ops.cast(run(), "float32"))
    times.append(time.perf_counter() - start)
assert np.isfinite(output).all()
print(json.dumps([*times, built, memory("VmHWM") - before]))
"""

WAYS_IN = """
import json, sys, time
import numpy as np
import keras
import keras_t5gemma as kt
way_in, length, layers, rematerialize = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
def memory(field):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))
stack = kt.StackConfig(layers, 512, 1024, 8, 8, 64)
backbone = kt.T5GemmaBackbone(stack, stack, vocabulary_size=32000)
backbone.rematerialize = rematerialize
lm = kt.T5GemmaSeq2SeqLM(backbone)
lm.compile(optimizer=keras.optimizers.SGD(0.01))
def call(length):
    ids = np.random.default_rng(0).integers(3, 32000, (1, length), dtype="int32")
    prompts = {"encoder_token_ids": ids, "encoder_padding_mask": np.ones_like(ids)}
    answers = ids[:, :16]
    x = {**prompts, "decoder_token_ids": answers, "decoder_padding_mask": np.ones_like(answers)}
    return {
        "predict": lambda: lm.predict(x, verbose=0),
        "evaluate": lambda: lm.evaluate(x, answers, verbose=0),
        "fit": lambda: lm.fit(x, answers, verbose=0),
        "embed": lambda: lm.embed(prompts),
        "score": lambda: lm.score(prompts, answers),
    }[way_in]()
for short in (64, 96, 128):
    call(short)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
start = time.perf_counter()
call(length)
print(json.dumps([time.perf_counter() - start, memory("VmHWM") - before]))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384], help="Tokens.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--ways-in", nargs="*", help="Of predict, evaluate, fit, embed and score; the encoder if none.")
    parser.add_argument("--layers", type=int, default=8, help="Of each stack, for --ways-in.")
    parser.add_argument("--rematerialize", action="store_true", help="For --ways-in.")
    arguments = parser.parse_args()
    if arguments.ways_in:
        return measure_ways_in(arguments)
    table = Table(title=f"Encoding one input, S-S, {arguments.dtype}")
    for heading in ("backend", "tokens", "first run, s", "seconds", "GB of the model", "peak GB"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        for length in arguments.lengths:
            result = run(backend, MEASURE, length, arguments.dtype)
            if result.returncode:
                table.add_row(backend, f"{length:,}", f"failed ({result.returncode})")
                print(result.stderr[-2000:], file=sys.stderr)
                continue
            first, seconds, built, peak = json.loads(result.stdout.splitlines()[-1])
            row = (f"{first:.1f}", f"{seconds:.1f}", f"{built / 1024:.2f}", f"{peak / 1024:.2f}")
            table.add_row(backend, f"{length:,}", *row)
            print(backend, f"{length:,}", *row, flush=True)
    Console(width=100).print(table)


def measure_ways_in(arguments):
    """Prints a row per backend, way and length as it comes."""
    print("backend, way in, tokens: seconds with tracing, peak GB above the short calls")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        for way_in in arguments.ways_in:
            for length in arguments.lengths:
                result = run(backend, WAYS_IN, way_in, length, arguments.layers, arguments.rematerialize)
                if result.returncode:
                    print(
                        backend, way_in, f"{length:,}: failed ({result.returncode})", result.stderr[-2000:], flush=True
                    )
                    continue
                seconds, peak = json.loads(result.stdout.splitlines()[-1])
                print(backend, way_in, f"{length:,}: {seconds:.1f}, {peak / 1024:.2f}", flush=True)


def run(backend, program, *arguments):
    """A program in a process of its own, on a backend."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


if __name__ == "__main__":
    main()
