"""Greedy decoding of Small-Small size beside keras-hub's T5Gemma and `transformers`: milliseconds a step.

    python benchmarks/decode.py                                     # every backend, batch 1, 256 input tokens
    python benchmarks/decode.py --batch 4 --inputs 1024             # and 16
    python benchmarks/decode.py --batch 16 --inputs 4096 --encoder-layers 1    # a step's cost without the encoder's
    python benchmarks/decode.py --dtype bfloat16
    python benchmarks/decode.py --dtype int8                        # or int4, int8_from_bfloat16: quantized weights

Vocabulary 256,000, random weights and ids, no stop ids. Each program runs in a process of its own. The first token's
time is that of an answer of `--short` tokens, `<bos>` included: by default 2, so one is generated. A step costs the
difference of two answers of `--long` and of `--middle` tokens, divided by the difference of their tokens, each after as
many answers as make `--warm-up` tokens: what is compiled or recorded on the way is ready then. "Compile" is what the
first call took besides. A step costs the same however many layers the encoder has; the first token does not.
`transformers` quantizes nothing here and has no row then.

The floor is the time that the bytes that a step must read take: the decoder's weights but for those that make
cross-attention's keys and values, its table once, and the keys and values of the input and of the tokens so far. The
speed of memory is the best at which PyTorch reads half a gigabyte of float32 on all cores in the same run: in products
of matrices of several widths with one vector or two, and in a dot product. With one vector the table can be slow.
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
import dataclasses, json, sys, time
import numpy as np
program, batch, inputs, dtype = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
short, middle, long, repeats, warm_up, layers = map(int, sys.argv[5:11])
V = 256000
ids = np.random.default_rng(0).integers(3, V, (batch, inputs), dtype="int32")
mode, _, policy = dtype.partition("_from_")
quantized = mode in ("int8", "int4")
policy = (policy or "float32") if quantized else dtype
def seconds(run):
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[0], min(times[1:])
if program == "floor":
    import torch
    repeats *= 5
    flat, other = torch.zeros(V * 512), torch.ones(V * 512)
    # The table with one vector and with two, which can be faster; wider matrices; two vectors of the table's size.
    shapes = [(512, 1), (512, 2), (2048, 1), (8192, 1), (32768, 1)]
    speeds = [4 * V * 512 / seconds(lambda: flat.view(-1, width) @ other[: width * n].view(n, width).T)[1]
        for width, n in shapes]
    speed = max(*speeds, 8 * V * 512 / seconds(lambda: torch.dot(flat, other))[1])
    # 8 layers: six attention kernels of 512 x 512, since cross-attention's keys and values are made once, and three of
    # 512 x 1,024; the table.
    weights = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}[mode] * (
        8 * (6 * 512 * 512 + 3 * 512 * 1024) + V * 512)
    cache = {"float32": 4, "bfloat16": 2}[policy] * 8 * 2 * 512 * batch * (inputs + (middle + long) // 2)
    print(json.dumps([speed, speeds[0], weights, cache]))
    sys.exit()
if program == "transformers":
    import torch, transformers
    stack = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, query_pre_attn_scalar=64, vocab_size=V)
    config = transformers.T5GemmaConfig(encoder=transformers.T5GemmaModuleConfig(**{**stack,
        "num_hidden_layers": layers}),
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
        encoder = dataclasses.replace(kt.STACKS["s"], num_layers=layers)
        model = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone(encoder, "s", dtype=policy))
    else:
        sizes = dict(hidden_dim=512, intermediate_dim=1024, num_layers=8, num_attention_heads=8, num_key_value_heads=8,
            head_dim=64, layer_types=["sliding_attention", "full_attention"] * 4)
        both = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in sizes.items()}
        both |= {"encoder_num_layers": layers, "encoder_layer_types": both["encoder_layer_types"][:layers]}
        model = keras_hub.models.T5GemmaSeq2SeqLM(preprocessor=None, backbone=keras_hub.models.T5GemmaBackbone(
            vocabulary_size=V, query_pre_attn_scalar=64, sliding_window=4096, attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0, cross_attention_hidden_size=512, dtype=policy, **both))
    if quantized:
        model.quantize(mode)
    model.compile(sampler="greedy")
    def generate(length):
        prompt = np.zeros((batch, length), "int32")
        prompt[:, 0] = 2
        return model.generate(dict(encoder_token_ids=ids, encoder_padding_mask=np.ones_like(ids),
            decoder_token_ids=prompt, decoder_padding_mask=(prompt == 2).astype("int32")), stop_token_ids=None)
first_call, short_time = seconds(lambda: generate(short))
times = []
for length in (middle, long):
    for _ in range(warm_up // length):
        generate(length)
    times.append(seconds(lambda: generate(length))[1])
step = (times[1] - times[0]) / (long - middle)
print(json.dumps([1e3 * step, 1e3 * (short_time - step * (short - 2)), first_call - short_time]))
"""


def measure(program, backend, arguments):
    """[ms a step, ms to the first token, s to compile], or what the process said as it failed.

    Of the program "floor": [bytes a second, those of a product with the table, and a step's bytes of weights and of
    keys and values].
    """
    command = [sys.executable, "-c", MEASURE, program, arguments.batch, arguments.inputs, arguments.dtype]
    command += [arguments.short, arguments.middle, arguments.long, arguments.repeats]
    command += [arguments.warm_up, arguments.encoder_layers]
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else result.stderr[-2000:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--inputs", type=int, default=256, help="Tokens the encoder reads.")
    parser.add_argument(
        "--dtype", default="float32", help="float32, bfloat16, int8, int4 or, e.g., int8_from_bfloat16."
    )
    parser.add_argument("--short", type=int, default=2, help="Tokens of the shorter answer, <bos> included; 2 or more.")
    parser.add_argument("--middle", type=int, default=18, help="Of a longer one.")
    parser.add_argument("--long", type=int, default=50, help="Of the longest.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=80, help="Tokens before what is measured, for each length.")
    parser.add_argument("--encoder-layers", type=int, default=8)
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--programs", nargs="*", default=["keras-hub", "keras-t5gemma", "transformers"])
    arguments = parser.parse_args()
    speed, table_speed, weights, cache = measure("floor", "torch", arguments)
    floor = 1e3 * (weights + cache) / speed
    title = f"Greedy decoding, S-S, batch {arguments.batch}, {arguments.inputs} input tokens, {arguments.dtype}"
    caption = (
        f"Floor: {floor:.1f} ms for {weights / 1e6:.0f} MB of weights and {cache / 1e6:.0f} MB of keys and values at "
        f"{speed / 1e9:.1f} GB/s; PyTorch's product of such a table and a vector: {table_speed / 1e9:.1f} GB/s"
    )
    table = Table(title=title, caption=caption)
    for heading in ("backend", "program", "ms a step", "to the floor", "first token, ms", "compile, s"):
        table.add_column(heading, justify="left" if heading in ("backend", "program") else "right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        for program in arguments.programs:
            if program == "transformers" and (backend != "torch" or arguments.dtype.startswith("int")):
                continue
            result = measure(program, backend, arguments)
            if isinstance(result, str):
                print(result, file=sys.stderr)
                row = ("failed",)
            else:
                step, first, compiling = result
                row = (f"{step:.1f}", f"{step / floor:.2f}", f"{first:.0f}", f"{compiling:.1f}")
            table.add_row(backend, program, *row)
            print(backend, program, *row, flush=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
