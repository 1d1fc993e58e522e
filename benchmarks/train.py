"""A training step at Small-Small size, compared with keras-hub's T5Gemma and `transformers`: seconds and peak memory.

    python benchmarks/train.py                                  # every backend, batch 2 x 128 + 128
    python benchmarks/train.py --batch 4 --length 512           # 4 x 512 + 512
    python benchmarks/train.py --dtype mixed_bfloat16

Vocabulary 256,000, random weights and ids, no padding. The optimizer is AdamW: keras-hub uses Keras's, this package its
own (`kt.optimizer("adamw")`), and transformers PyTorch's. Each program runs in its own process. Seconds are the median
of the steps after the warm-up. Memory is the peak above the bare import, in GB of 1e9 bytes. To measure a long table in
parts, select programs with `--programs`. Ratios are relative to the first program.
"""

import argparse
import importlib.util
import json
import statistics
import sys

import own_process
import record
from rich.console import Console
from rich.table import Table


def recorded(arguments, backend, measured):
    """Rows of one backend: this package's, with the other programs as peers; or only the others'."""
    ours = {name: numbers for name, numbers in measured.items() if name == "keras-t5gemma"}
    configuration = {
        "topic": "A training step",
        "backend": backend,
        "model": "s_s",
        "vocabulary_size": 256_000,
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "encoder_length": arguments.length,
        "decoder_length": arguments.length,
        "environment": record.environment(),
    }
    peers = [{"program": name, **numbers} for name, numbers in measured.items() if ours and name not in ours]
    aims = aims_of(arguments, backend) if ours else []
    return [
        {**configuration, "program": name, **numbers, "peer": peers, "aim": aims}
        for name, numbers in (ours or measured).items()
    ]


def aims_of(arguments, backend):
    """The aims of a step, at the two sizes that have an aim."""
    size = (arguments.batch, arguments.length)
    if arguments.dtype == "mixed_bfloat16" and size == (2, 128):
        return [{"field": "seconds", "at_most": 0.4, "of": "transformers"}]
    if arguments.dtype != "float32":
        return []
    return {
        (2, 128): [
            {"field": "seconds", "at_most": 0.85, "of": "keras-hub"},
            {"field": "peak_gb", "at_most": 6.0, "of": None},
        ],
        (4, 512): [
            {"field": "seconds", "at_most": 0.8 if backend == "tensorflow" else 0.5, "of": "keras-hub"},
            {"field": "peak_gb", "at_most": 0.5, "of": "keras-hub"},
        ],
    }.get(size, [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="Tokens of the encoder, and of the decoder.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=3, help="Measured steps, after the warm-up.")
    parser.add_argument("--warm-up", type=int, default=2, help="Steps before the measured ones.")
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--programs", nargs="*", default=["keras-hub", "keras-t5gemma", "transformers"])
    record.add_options(parser)
    arguments = parser.parse_args()
    title = f"Training step, S-S, batch {arguments.batch} x {arguments.length} + {arguments.length}, {arguments.dtype}"
    table = Table(title=title)
    for heading in (
        "backend",
        "program",
        "seconds",
        "ratio",
        "peak GB",
        "ratio",
        "loss",
        "first step, s",
    ):
        table.add_column(heading, justify="left" if heading in ("backend", "program") else "right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        reference, measured = None, {}
        for program in arguments.programs:
            if program == "transformers" and backend != "torch":
                continue
            options = (arguments.batch, arguments.length, arguments.dtype, arguments.steps, arguments.warm_up)
            result = own_process.run(backend, "train_step", program, *options)
            if result.returncode:
                table.add_row(backend, program, f"failed ({result.returncode})")
                print(result.stderr[-2000:], file=sys.stderr)
                continue
            times, peak, loss, first = json.loads(result.stdout.splitlines()[-1])
            seconds = statistics.median(times)
            measured[program] = {"seconds": times, "peak_gb": peak}
            reference = reference or (seconds, peak)
            ratios = [f"{value / base:.2f}" for value, base in zip((seconds, peak), reference, strict=True)]
            row = (f"{seconds:.2f}", ratios[0], f"{peak:.2f}", ratios[1], f"{loss:.3f}", f"{first:.1f}")
            table.add_row(backend, program, *row)
        record.record(arguments, recorded(arguments, backend, measured))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
