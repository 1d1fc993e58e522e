"""Greedy decoding at Small-Small size, compared with keras-hub's T5Gemma and `transformers`: milliseconds per step.

    python benchmarks/decode.py                                     # every backend, batch 1, 256 input tokens
    python benchmarks/decode.py --batch 4 --inputs 1024             # and 16
    python benchmarks/decode.py --batch 16 --inputs 4096 --encoder-layers 1    # a step's cost without the encoder's
    python benchmarks/decode.py --dtype bfloat16
    python benchmarks/decode.py --dtype int8                        # or int4, int8_from_bfloat16: quantized weights

Vocabulary 256,000, random weights and ids, no stop ids. Each program runs in its own process. The time of the first
token is that of an answer of `--short` tokens, including `<bos>`. The default is 2, so one token is generated. A step
is the time difference of two answers of `--long` and of `--middle` tokens, divided by the difference of their tokens.
Each is measured after answers with `--warm-up` tokens in total, so that compilation and recording are finished.
"Compile" is the additional time of the first call. The number of the encoder's layers changes the first token's time,
but not a step's. `transformers` has no row for quantized weights, because it does not quantize them here.

The floor is the time to read the bytes that a step must read. These are the decoder's weights except those that compute
cross-attention's keys and values, its table once, and the keys and values of the input and of the tokens so far. The
memory bandwidth is the best at which PyTorch reads half a gigabyte of float32 on all cores in the same run: in products
of matrices of several widths with one or two vectors, and in a dot product. With one vector the table can be slow.
"""

import argparse
import importlib.util
import json
import sys

import own_process
import record
from rich.console import Console
from rich.table import Table


def measure(program, backend, arguments):
    """[ms per step, ms to the first token, s to compile], or the error text if the process failed."""
    options = [arguments.batch, arguments.inputs, arguments.dtype, arguments.short, arguments.middle, arguments.long]
    options += [arguments.repeats, arguments.warm_up, arguments.encoder_layers]
    result = own_process.run(backend, "decode_step", program, *options)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else result.stderr[-2000:]


def measure_floor(arguments):
    """[bytes per second, the same in a product with the table, bytes of a step's weights and of keys and values]."""
    options = [arguments.batch, arguments.inputs, arguments.dtype, arguments.middle, arguments.long, arguments.repeats]
    result = own_process.run("torch", "memory_floor", *options, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def recorded(arguments, backend, measured, floor):
    """Rows of one backend: this package's, with the other programs and the floor as peers; or only the others'."""
    numbers = {
        name: {"step_ms": step, "first_token_ms": first, "compile_s": compiling}
        for name, (step, first, compiling) in measured.items()
    }
    ours = {name: values for name, values in numbers.items() if name == "keras-t5gemma"}
    configuration = {
        "topic": "A decoding step",
        "backend": backend,
        "model": "s_s",
        "vocabulary_size": 256_000,
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "inputs": arguments.inputs,
        "encoder_layers": arguments.encoder_layers,
        "environment": record.environment(),
    }
    peers = [{"program": name, **values} for name, values in numbers.items() if ours and name not in ours]
    peers.append({"program": "floor", "step_ms": floor})
    aims = aims_of(arguments) if ours else []
    return [
        {**configuration, "program": name, **values, "peer": peers, "aim": aims}
        for name, values in (ours or numbers).items()
    ]


def aims_of(arguments):
    """The aims: one row takes little more than the floor and no more than a peer, several rows 0.6 of a peer."""
    batch, inputs = arguments.batch, arguments.inputs
    if arguments.dtype == "float32" and (batch, inputs) == (1, 256):
        return [{"field": "step_ms", "at_most": bound, "of": of} for bound, of in ((1.15, "floor"), (1.0, "best peer"))]
    if arguments.dtype == "float32" and batch > 1 and batch * inputs >= 4096:
        return [{"field": "step_ms", "at_most": 0.6, "of": "best peer"}]
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--inputs", type=int, default=256, help="Tokens the encoder reads.")
    parser.add_argument(
        "--dtype", default="float32", help="float32, bfloat16, int8, int4 or, e.g., int8_from_bfloat16."
    )
    parser.add_argument(
        "--short", type=int, default=2, help="Tokens of the shortest answer, including <bos>; 2 or more."
    )
    parser.add_argument("--middle", type=int, default=18, help="Tokens of a longer answer.")
    parser.add_argument("--long", type=int, default=50, help="Tokens of the longest answer.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--warm-up", type=int, default=80, help="Tokens to generate before the measurement of each length."
    )
    parser.add_argument("--encoder-layers", type=int, default=8)
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--programs", nargs="*", default=["keras-hub", "keras-t5gemma", "transformers"])
    record.add_options(parser)
    arguments = parser.parse_args()
    speed, table_speed, weights, cache = measure_floor(arguments)
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
        measured = {}
        for program in arguments.programs:
            if program == "transformers" and (backend != "torch" or arguments.dtype.startswith("int")):
                continue
            result = measure(program, backend, arguments)
            if isinstance(result, str):
                print(result, file=sys.stderr)
                row = ("failed",)
            else:
                step, first, compiling = measured[program] = result
                row = (f"{step:.1f}", f"{step / floor:.2f}", f"{first:.0f}", f"{compiling:.1f}")
            table.add_row(backend, program, *row)
            print(backend, program, *row, flush=True)
        record.record(arguments, recorded(arguments, backend, measured, floor))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
