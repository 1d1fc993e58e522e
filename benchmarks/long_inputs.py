"""Encoding long inputs with a Small-Small sized encoder: seconds and peak memory, by length and backend.

    python benchmarks/long_inputs.py
    python benchmarks/long_inputs.py --lengths 32768 --backends jax --dtype bfloat16
    python benchmarks/long_inputs.py --ways-in predict evaluate fit embed score --layers 2 --lengths 16384

Vocabulary 256,000, random weights and ids, one input without padding. The encoder is compiled on JAX and TensorFlow,
and eager on PyTorch. Each length runs in its own process. Seconds are those of the second run. Memory is the peak above
the bare import, and includes the model. The weights of both stacks take 1.25 GB in float32.

With `--ways-in`, the model is called through its public methods, with a vocabulary of 32,000 and 16 target tokens. The
measured call follows calls with 64, 96 and 128 input tokens, and memory is the peak above their level. TensorFlow then
runs a function that it traced for any length.
"""

import argparse
import importlib.util
import json
import sys

import own_process
import record
from rich.console import Console
from rich.table import Table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384], help="Input tokens.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument(
        "--ways-in", nargs="*", help="Methods: predict, evaluate, fit, embed, score. Default: the encoder."
    )
    parser.add_argument("--layers", type=int, default=8, help="Layers per stack, for --ways-in.")
    parser.add_argument("--rematerialize", action="store_true", help="Rematerialize, for --ways-in.")
    record.add_options(parser)
    arguments = parser.parse_args()
    if arguments.ways_in:
        return measure_ways_in(arguments)
    table = Table(title=f"Encoding one input, S-S, {arguments.dtype}")
    for heading in ("backend", "tokens", "first run, s", "seconds", "GB of the model", "peak GB"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        for length in arguments.lengths:
            result = own_process.run(backend, "encode_long_input", length, arguments.dtype)
            if result.returncode:
                table.add_row(backend, f"{length:,}", f"failed ({result.returncode})")
                print(result.stderr[-2000:], file=sys.stderr)
                continue
            first, seconds, built, peak = json.loads(result.stdout.splitlines()[-1])
            row = (f"{first:.1f}", f"{seconds:.1f}", f"{built / 1024:.2f}", f"{peak / 1024:.2f}")
            table.add_row(backend, f"{length:,}", *row)
            print(backend, f"{length:,}", *row, flush=True)
            row = {
                "topic": "Long inputs",
                "backend": backend,
                "model": "s_s",
                "vocabulary_size": 256_000,
                "dtype": arguments.dtype,
                "length": length,
                "first_run_s": first,
                "seconds": [seconds],
                "model_gib": built / 1024,
                "peak_gib": peak / 1024,
                "aim": peak_aim(length),
            }
            record.record(arguments, [row])
    Console(width=100).print(table)


def measure_ways_in(arguments):
    """Prints one row per backend, method and length as soon as it is measured."""
    print("backend, way in, tokens: seconds with tracing, peak GB above the short calls")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        for way_in in arguments.ways_in:
            for length in arguments.lengths:
                options = (way_in, length, arguments.layers, arguments.rematerialize)
                result = own_process.run(backend, "call_long_input", *options)
                if result.returncode:
                    print(
                        backend, way_in, f"{length:,}: failed ({result.returncode})", result.stderr[-2000:], flush=True
                    )
                    continue
                seconds, peak = json.loads(result.stdout.splitlines()[-1])
                print(backend, way_in, f"{length:,}: {seconds:.1f}, {peak / 1024:.2f}", flush=True)
                row = {
                    "topic": "Long inputs by the way in",
                    "backend": backend,
                    "way_in": way_in,
                    "layers": arguments.layers,
                    "length": length,
                    "rematerialize": arguments.rematerialize,
                    "dtype": "float32",
                    "vocabulary_size": 32_000,
                    "targets": 16,
                    "seconds": [seconds],
                    "peak_gib": peak / 1024,
                    "aim": peak_aim(length) if arguments.layers == 2 else [],
                }
                record.record(arguments, [row])


def peak_aim(length):
    """The aim: at most 3 GB at 16,384 tokens."""
    return [{"field": "peak_gib", "at_most": 3.0, "of": None}] if length == 16_384 else []


if __name__ == "__main__":
    main()
