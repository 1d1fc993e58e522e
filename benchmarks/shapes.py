"""Prompts of random shape, one after the other: how many programs are compiled, and what that costs.

    python benchmarks/shapes.py

100 requests of 1 to 5 prompts of up to 200 tokens, for up to 60 tokens, in an order drawn once; greedy, no stop ids.
keras-hub pads its prompts to one length, as its preprocessor does. Each program has `--seconds` for as many requests as
it can, in a process of its own. The model is small, two layers of width 128 a stack, so that a request takes
milliseconds and a compilation seconds; both grow with the model. What keras-hub compiled is counted by the shapes that
it was given, each of which it compiles.
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
import keras, keras_hub
program, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
V, LONGEST = 8000, 200
sizes = dict(num_layers=2, hidden_dim=128, intermediate_dim=256, head_dim=32)
backend = keras.config.backend()
if program == "keras-t5gemma":
    import keras_t5gemma as kt
    stack = dict(**sizes, num_query_heads=4, num_key_value_heads=2)
    model = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone(stack, stack, vocabulary_size=V))
else:
    kinds = ["sliding_attention", "full_attention"]
    layers = dict(**sizes, num_attention_heads=4, num_key_value_heads=2, layer_types=kinds)
    both = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in layers.items()}
    model = keras_hub.models.T5GemmaSeq2SeqLM(preprocessor=None, backbone=keras_hub.models.T5GemmaBackbone(
        vocabulary_size=V, query_pre_attn_scalar=32, sliding_window=4096, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, cross_attention_hidden_size=128, **both))
model.compile(sampler="greedy")
generator, shapes = np.random.default_rng(0), set()
start, done = time.perf_counter(), 0
while done < count and time.perf_counter() - start < seconds:
    rows, length, longest = (int(generator.integers(*span)) for span in ((1, 6), (1, LONGEST + 1), (2, 61)))
    width = length if program == "keras-t5gemma" else LONGEST
    ids, mask = np.zeros((rows, width), "int32"), np.zeros((rows, width), "int32")
    ids[:, :length], mask[:, :length] = generator.integers(3, V, (rows, length)), 1
    prompt = np.zeros((rows, longest), "int32")
    prompt[:, 0] = 2
    model.generate(dict(encoder_token_ids=ids, encoder_padding_mask=mask, decoder_token_ids=prompt,
        decoder_padding_mask=(prompt == 2).astype("int32")), stop_token_ids=None)
    shapes.add((rows, width, longest))
    done += 1
spent = time.perf_counter() - start
if backend == "torch":
    programs = 0
elif program == "keras-hub":
    programs = len(shapes)
else:
    counter = {"jax": "_cache_size", "tensorflow": "experimental_get_tracing_count"}[backend]
    programs = sum(getattr(one._compiled, counter)() for one in model.programs.values("generate"))
print(json.dumps([done, programs, spent]))
"""


def measure(program, backend, arguments):
    """[requests, programs, seconds], or what the process said as it failed."""
    command = [sys.executable, "-c", MEASURE, program, str(arguments.prompts), str(arguments.seconds)]
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else result.stderr[-2000:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="Requests, at most.")
    parser.add_argument("--seconds", type=float, default=40, help="For each program; the request begun is the last.")
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--programs", nargs="*", default=["keras-hub", "keras-t5gemma"])
    arguments = parser.parse_args()
    table = Table(title=f"Up to {arguments.prompts} requests of random shape in {arguments.seconds:.0f} s")
    for heading in ("backend", "program", "requests", "compiled", "seconds", "s a request"):
        table.add_column(heading, justify="left" if heading in ("backend", "program") else "right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        for program in arguments.programs:
            result = measure(program, backend, arguments)
            if isinstance(result, str):
                table.add_row(backend, program, "failed")
                print(result, file=sys.stderr)
                continue
            done, programs, seconds = result
            table.add_row(backend, program, str(done), str(programs), f"{seconds:.1f}", f"{seconds / done:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
