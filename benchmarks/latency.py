"""Latency of an encoder-decoder compared with Gemma 2 of its decoder's size, as in the announcement of T5Gemma.

    python benchmarks/latency.py                                      # full size, bfloat16: an accelerator of 80 GB
    python benchmarks/latency.py --scale 8 --dtype float32            # an eighth of each width: minutes on two cores
    python benchmarks/latency.py --only 9b_2b >> lines.jsonl          # one program, as a line of JSON
    python benchmarks/latency.py --table lines.jsonl                  # the table of these lines

Gemma 2 is keras-hub's `GemmaCausalLM` with Gemma 2's settings. Weights are random, decoding is greedy, the batch is 1,
and there are no stop ids. 150 tokens in and 200 out are about GSM8K's lengths. The input is read by the encoder in one
model and by the decoder in the other. `--scale` divides the widths: hidden and feed-forward, the head size, and the
vocabulary. The numbers of layers and heads stay the same.

Each program runs in its own process. "Total" is the fastest of `--repeats` calls of `generate()` after a first one.
"Compile" is the additional time of the first call. A step is the difference of two totals, of 200 and of `--short`
tokens, divided by the difference of their tokens. The first token is the shorter total minus its steps. "Used" is model
bandwidth utilization: the bytes that a step must read, divided by the step's time and the device's bandwidth. These
bytes are the decoder's weights except those that compute cross-attention's keys and values, its table once, and the
keys and values of the input and of the tokens so far. The bandwidth is measured immediately before: bytes read plus
bytes written while each number of a large array is increased in place.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import record

# By program: the encoder's and the decoder's size; Gemma 2 has no encoder.
PROGRAMS = {
    "gemma2_2b": (None, "2b"),
    "2b_2b": ("2b", "2b"),
    "9b_2b": ("9b", "2b"),
    "gemma2_9b": (None, "9b"),
    "9b_9b": ("9b", "9b"),
}
VOCABULARY = 256_000


def fastest(run, repeats):
    """Seconds of the first call, and of the fastest of the later ones."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[0], min(times[1:])


def device():
    """`(kind, name)` of the backend's device, e.g. ("gpu", "NVIDIA H100")."""
    import keras

    if keras.config.backend() == "jax":
        import jax

        return jax.devices()[0].platform, jax.devices()[0].device_kind
    if keras.config.backend() == "torch":
        import torch

        return ("gpu", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("cpu", "cpu")
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return ("gpu", tf.config.experimental.get_device_details(found[0])["device_name"]) if found else ("cpu", "cpu")


def bandwidth(megabytes):
    """The device's bandwidth: bytes read and written per second."""
    import keras

    count = megabytes * 2**20 // 4
    if keras.config.backend() == "jax":
        import jax

        held = [jax.numpy.zeros(count)]
        increase = jax.jit(lambda x: x + 1, donate_argnums=0)

        def run():
            held[0] = increase(held[0]).block_until_ready()

    elif keras.config.backend() == "torch":
        import torch

        tensor = torch.zeros(count, device=device()[0].replace("gpu", "cuda"))

        def run():
            tensor.add_(1)[0].item()  # a number that Python sees, so that the work is done

    else:
        import tensorflow as tf

        variable = tf.Variable(tf.zeros(count))
        increase = tf.function(lambda: variable.assign_add(tf.ones_like(variable))[0], jit_compile=True)

        def run():
            increase().numpy()

    return 2 * 4 * count / fastest(run, 5)[1]


def scaled(size, scale):
    """The `StackConfig` of a size, each width divided."""
    from keras_t5gemma.presets import STACKS

    stack = STACKS[size]
    widths = {name: getattr(stack, name) for name in ("hidden_dim", "intermediate_dim", "head_dim")}
    if any(width % scale for width in widths.values()) or widths["head_dim"] // scale % 2:
        raise ValueError(f"`--scale` must divide {widths}, and heads be of even size. Received: {scale}.")
    return replace(stack, **{name: width // scale for name, width in widths.items()})


def nbytes(variables):
    """Bytes of variables."""
    import keras

    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    return sum(math.prod(v.shape) * sizes[keras.backend.standardize_dtype(v.dtype)] for v in variables)


def build_gemma2(stack, arguments):
    """`(generate(tokens), variables that a step reads, positions kept before the first new one)`."""
    import keras_hub
    import numpy as np

    from keras_t5gemma.demo import pretraining

    model = keras_hub.models.GemmaCausalLM(pretraining.build_gemma2(stack, VOCABULARY // arguments.scale))
    model.compile(sampler="greedy")
    ids = np.random.default_rng(0).integers(3, VOCABULARY // arguments.scale, (1, arguments.inputs), dtype="int32")

    def generate(tokens):
        token_ids = np.pad(ids, ((0, 0), (0, tokens)))
        mask = np.arange(token_ids.shape[1])[None] < arguments.inputs
        model.generate({"token_ids": token_ids, "padding_mask": mask.astype("int32")}, stop_token_ids=None)

    return generate, model.backbone.weights, arguments.inputs


def build_t5gemma(encoder, decoder, arguments):
    """`(generate(tokens), variables that a step reads, positions kept before the first new one)`."""
    import numpy as np

    import keras_t5gemma as kt

    vocabulary_size = VOCABULARY // arguments.scale
    model = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone(encoder, decoder, vocabulary_size=vocabulary_size))
    model.compile(sampler="greedy")
    ids = np.random.default_rng(0).integers(3, vocabulary_size, (1, arguments.inputs), dtype="int32")

    def generate(tokens):
        model.generate({"encoder_token_ids": ids}, max_new_tokens=tokens, stop_token_ids=None)

    once = ("cross_attention/key/kernel", "cross_attention/value/kernel")
    return generate, [v for v in model.backbone.decoder.weights if not v.path.endswith(once)], arguments.inputs + 1


def measure(program, arguments):
    """Measures one program in this process; returns the content of its line of JSON."""
    import keras

    keras.config.set_dtype_policy(arguments.dtype)
    kind, name = device()
    speed = bandwidth(512 if kind == "cpu" else 4096)  # several times the caches
    encoder, decoder = (size and scaled(size, arguments.scale) for size in PROGRAMS[program])
    start = time.perf_counter()
    if encoder is None:
        generate, weights, kept = build_gemma2(decoder, arguments)
    else:
        generate, weights, kept = build_t5gemma(encoder, decoder, arguments)
    built = time.perf_counter() - start
    tokens = arguments.tokens
    first_call, total = fastest(lambda: generate(tokens), arguments.repeats)
    short = fastest(lambda: generate(arguments.short), arguments.repeats)[1]
    step = (total - short) / (tokens - arguments.short)
    number = nbytes(weights[:1]) // math.prod(weights[0].shape)  # bytes
    position = 2 * decoder.num_layers * decoder.num_key_value_heads * decoder.head_dim * number
    # The steps measured are those from `short` to `tokens`.
    cache = position * (kept + (tokens + arguments.short) / 2)
    must_read = nbytes(weights) + cache
    return {
        "program": program,
        "backend": keras.config.backend(),
        "device": name,
        "dtype": arguments.dtype,
        "scale": arguments.scale,
        "inputs": arguments.inputs,
        "tokens": tokens,
        "build_s": built,
        "compile_s": first_call - total,
        "total_s": total,
        "first_token_ms": 1e3 * (short - step * (arguments.short - 1)),
        "step_ms": 1e3 * step,
        "weights_read_mb": nbytes(weights) / 1e6,
        "cache_read_mb": cache / 1e6,
        "bandwidth_gb_s": speed / 1e9,
        "utilisation": must_read / speed / step,
    }


def print_table(lines):
    """One row per program; ratios are to the Gemma 2 of the decoder's size on the same backend and device."""
    from rich.console import Console
    from rich.table import Table

    first = lines[0]
    title = f"{first['inputs']} tokens in, {first['tokens']} out, batch 1, {first['dtype']}, widths 1/{first['scale']}"
    table = Table(title=title, caption=", ".join(sorted({line["device"] for line in lines})))
    for heading in ("backend", "program"):
        table.add_column(heading)
    for heading in ("total, s", "ms a token", "to Gemma 2", "first token, ms", "ms a step", "to Gemma 2", "MB a step"):
        table.add_column(heading, justify="right")
    for heading in ("GB/s", "used", "compile, s"):
        table.add_column(heading, justify="right")
    gemmas = {(line["backend"], line["program"]): line for line in lines}
    for line in lines:
        gemma = gemmas.get((line["backend"], f"gemma2_{PROGRAMS[line['program']][1]}"))
        ratios = [f"{line[key] / gemma[key]:.2f}" if gemma else "" for key in ("total_s", "step_ms")]
        table.add_row(
            line["backend"],
            line["program"],
            f"{line['total_s']:.2f}",
            f"{1e3 * line['total_s'] / line['tokens']:.1f}",
            ratios[0],
            f"{line['first_token_ms']:.0f}",
            f"{line['step_ms']:.2f}",
            ratios[1],
            f"{line['weights_read_mb'] + line['cache_read_mb']:,.0f}",
            f"{line['bandwidth_gb_s']:,.0f}",
            f"{line['utilisation']:.2f}",
            f"{line['compile_s']:.1f}",
        )
    Console(width=140).print(table)


def recorded(lines):
    """One row per encoder-decoder, with the Gemma 2 of its decoder's size as its peer."""
    fields = ("total_s", "step_ms", "first_token_ms", "bandwidth_gb_s", "compile_s")
    numbers = {
        line["program"]: {**{field: line[field] for field in fields}, "bandwidth_share": line["utilisation"]}
        for line in lines
    }
    rows = []
    for line in lines:
        encoder, decoder = PROGRAMS[line["program"]]
        gemma2 = f"gemma2_{decoder}"
        if encoder:
            configuration = {name: line[name] for name in ("backend", "program", "dtype", "scale", "inputs", "tokens")}
            peers = [{"program": gemma2, **numbers[gemma2]}] if gemma2 in numbers else []
            aims = [{"field": "bandwidth_share", "at_least": 0.6, "of": None}]
            topic = {"topic": "Latency of an encoder-decoder", "batch": 1}
            rows.append({**topic, **configuration, **numbers[line["program"]], "peer": peers, "aim": aims})
    return rows


def run_all(arguments):
    """The lines of all programs, each from its own process; a failed program has no line."""
    wanted = [name for pair in arguments.pairs for name in (f"gemma2_{PROGRAMS[pair][1]}", pair)]
    lines = []
    for program in dict.fromkeys(wanted):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", program]
        result = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            print(f"{program} failed ({result.returncode}).", file=sys.stderr)
            continue
        print(line := result.stdout.splitlines()[-1], flush=True)
        lines.append(json.loads(line))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pairs = [name for name, (encoder, _) in PROGRAMS.items() if encoder]
    parser.add_argument(
        "--pairs",
        nargs="*",
        default=["9b_2b", "9b_9b"],
        choices=pairs,
        help="Pairs to measure, each after its Gemma 2.",
    )
    parser.add_argument("--only", choices=list(PROGRAMS), help="Measure one program and print its line.")
    parser.add_argument("--table", type=Path, metavar="FILE", help="Print the table of a file's lines.")
    parser.add_argument("--backend", default="jax", choices=["jax", "tensorflow", "torch"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scale", type=int, default=1, help="Divide widths by this: 1, 2, 4, ..., 128.")
    parser.add_argument("--inputs", type=int, default=150, help="Tokens in.")
    parser.add_argument("--tokens", type=int, default=200, help="Tokens out.")
    parser.add_argument("--short", type=int, default=8, help="Tokens of the shorter answer.")
    parser.add_argument("--repeats", type=int, default=3)
    record.add_options(parser)
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # JAX takes three quarters of a device's memory by itself: of 80 GB that is little more than 9B-9B's weights.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)), flush=True)
        return
    lines = [json.loads(line) for line in arguments.table.open()] if arguments.table else run_all(arguments)
    if lines:
        print_table(lines)
        record.record(arguments, recorded(lines))


if __name__ == "__main__":
    main()
