"""Greedy decoding of Small-Small size beside keras-hub's T5Gemma and `transformers`: milliseconds a step.

    python benchmarks/decode.py                                     # every backend, batch 1, 256 input tokens
    python benchmarks/decode.py --batch 4 --inputs 1024             # and 16, 4096
    python benchmarks/decode.py --dtype bfloat16

Vocabulary 256,000, random weights and ids, no stop ids. A step's cost is the difference of two lengths of the answer,
divided by the difference of their tokens; the first token's is that of the shorter answer less its steps. Each program
runs in a process of its own. The floor is the time the decoder's weights, its table included, take to be read once, by
the speed of a matrix-vector product of the table's size measured in the same run.
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
program, batch, inputs, dtype, short, long, repeats = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], *map(
    int, sys.argv[5:8])
V = 256000
ids = np.random.default_rng(0).integers(3, V, (batch, inputs), dtype="int32")
def seconds(run):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
if program == "floor":
    import torch
    table, x = torch.zeros(V, 512), torch.ones(512)
    speed = table.numel() * 4 / seconds(lambda: torch.mv(table, x))
    size = {"float32": 4, "bfloat16": 2}[dtype]
    # 8 layers: four attention kernels of 512 x 512 twice, three of 512 x 1,024; the table; the encoder runs once.
    print(json.dumps([1e3 * size * (8 * (8 * 512 * 512 + 3 * 512 * 1024) + V * 512) / speed, None, None]))
    sys.exit()
if program == "transformers":
    import torch, transformers
    stack = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, query_pre_attn_scalar=64, vocab_size=V)
    config = transformers.T5GemmaConfig(encoder=transformers.T5GemmaModuleConfig(**stack),
        decoder=transformers.T5GemmaModuleConfig(**stack), vocab_size=V, attn_implementation="eager")
    model = transformers.T5GemmaForConditionalGeneration(config).eval().to(getattr(torch, dtype))
    tensor = torch.from_numpy(ids).long()
    def generate(length):
        return model.generate(tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=length - 1,
            min_new_tokens=length - 1, do_sample=False, decoder_start_token_id=2, eos_token_id=1)
else:
    import keras, keras_hub
    if program == "keras-t5gemma":
        import keras_t5gemma as kt
        model = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone("s", "s", dtype=dtype))
    else:
        sizes = dict(hidden_dim=512, intermediate_dim=1024, num_layers=8, num_attention_heads=8, num_key_value_heads=8,
            head_dim=64, layer_types=["sliding_attention", "full_attention"] * 4)
        both = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in sizes.items()}
        model = keras_hub.models.T5GemmaSeq2SeqLM(preprocessor=None, backbone=keras_hub.models.T5GemmaBackbone(
            vocabulary_size=V, query_pre_attn_scalar=64, sliding_window=4096, attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0, cross_attention_hidden_size=512, dtype=dtype, **both))
    model.compile(sampler="greedy")
    def generate(length):
        prompt = np.zeros((batch, length), "int32")
        prompt[:, 0] = 2
        return model.generate(dict(encoder_token_ids=ids, encoder_padding_mask=np.ones_like(ids),
            decoder_token_ids=prompt, decoder_padding_mask=(prompt == 2).astype("int32")), stop_token_ids=None)
start = time.perf_counter()
generate(short)
first_call = time.perf_counter() - start
times = [seconds(lambda: generate(length)) for length in (short, long)]
step = (times[1] - times[0]) / (long - short)
print(json.dumps([1e3 * step, 1e3 * (times[0] - step * (short - 2)), first_call - times[0]]))
"""


def measure(program, backend, arguments):
    """[ms a step, ms to the first token, s to compile], or what the process said as it failed."""
    command = [sys.executable, "-c", MEASURE, program, arguments.batch, arguments.inputs, arguments.dtype]
    command += [arguments.short, arguments.long, arguments.repeats]
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else result.stderr[-2000:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--inputs", type=int, default=256, help="Tokens the encoder reads.")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--short", type=int, default=8, help="Tokens of the shorter answer.")
    parser.add_argument("--long", type=int, default=40, help="Of the longer.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--programs", nargs="*", default=["keras-hub", "keras-t5gemma", "transformers"])
    arguments = parser.parse_args()
    floor = measure("floor", "torch", arguments)[0]
    title = f"Greedy decoding, S-S, batch {arguments.batch}, {arguments.inputs} input tokens, {arguments.dtype}"
    table = Table(title=title, caption=f"Floor: {floor:.1f} ms")
    for heading in ("backend", "program", "ms a step", "to the floor", "first token, ms", "compile, s"):
        table.add_column(heading, justify="left" if heading in ("backend", "program") else "right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        for program in arguments.programs:
            if program == "transformers" and backend != "torch":
                continue
            result = measure(program, backend, arguments)
            if isinstance(result, str):
                table.add_row(backend, program, "failed")
                print(result, file=sys.stderr)
                continue
            step, first, compiling = result
            row = (f"{step:.1f}", f"{step / floor:.2f}", f"{first:.0f}", f"{compiling:.1f}")
            table.add_row(backend, program, *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
