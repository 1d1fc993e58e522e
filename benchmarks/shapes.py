"""Prompts of random shape, one after another: the number of compiled programs, and their cost.

    python benchmarks/shapes.py

100 requests of 1 to 5 prompts of up to 200 tokens, for up to 60 tokens, in a random order drawn once; greedy, no stop
ids. keras-hub's prompts are padded to one length, as its preprocessor does. Each program runs in its own process, and
answers as many requests as it can in `--seconds`. The model is small, with two layers of width 128 per stack. So a
request takes milliseconds and a compilation takes seconds; both grow with the model. keras-hub's programs are counted
by the shapes of its inputs, because it compiles each of them.
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
    """[requests, programs, seconds], or the error text if the process failed."""
    result = own_process.run(backend, "random_requests", program, arguments.prompts, arguments.seconds)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else result.stderr[-2000:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="The most requests.")
    parser.add_argument("--seconds", type=float, default=40, help="Time per program; the current request is finished.")
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--programs", nargs="*", default=["keras-hub", "keras-t5gemma"])
    record.add_options(parser)
    arguments = parser.parse_args()
    table = Table(title=f"Up to {arguments.prompts} requests of random shape in {arguments.seconds:.0f} s")
    for heading in ("backend", "program", "requests", "compiled", "seconds", "s a request"):
        table.add_column(heading, justify="left" if heading in ("backend", "program") else "right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        measured = {}
        for program in arguments.programs:
            result = measure(program, backend, arguments)
            if isinstance(result, str):
                table.add_row(backend, program, "failed")
                print(result, file=sys.stderr)
                continue
            done, programs, seconds = result
            measured[program] = {"requests": done, "compiled": programs, "seconds_per_request": seconds / done}
            table.add_row(backend, program, str(done), str(programs), f"{seconds:.1f}", f"{seconds / done:.2f}")
        ours = measured.pop("keras-t5gemma", None)
        if ours:
            peers = [{"program": name, **numbers} for name, numbers in measured.items()]
            row = {"topic": "The cost of compiling", "backend": backend, "given_s": arguments.seconds, **ours}
            record.record(arguments, [{**row, "peer": peers}])
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
