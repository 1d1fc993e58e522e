"""Requests over HTTP at random times: continuous batching, batches by `generate` and by CTranslate2, one by one.

    python benchmarks/serve.py                                             # Small-Small, 200 requests
    python benchmarks/serve.py --size tiny --requests 40 --rate 20         # seconds on two cores

Each way runs behind the same server, in a process of its own. Another process sends the requests over the loopback and
reads the answers as streams. They arrive as a Poisson process of `--rate` requests per second. Their prompts have 8 to
100 words, their answers 8 to 128 tokens, drawn once with a seed. Weights are random, decoding is greedy.

"dynamic" answers all requests that wait, up to `--slots`, by one call of `generate`, which pads the batch to a few
sizes. "single" answers one after the other. Both compile all their programs before, as the batcher does. They have no
text before the end of an answer. "First token" is the time from sending a request to its first text. "Per token" is the
whole time of a request divided by the tokens of its answer, which includes waiting.

"ctranslate2" is the same as "dynamic", by CTranslate2's `translate_batch`, which runs no Python and computes another
model in the same time (docs/exports.md).
"""

import argparse
import importlib.util
import json
import subprocess
import sys

import own_process
import record
from rich.console import Console
from rich.table import Table

WAYS = ("continuous", "dynamic", "single", "ctranslate2")
FIELDS = ("tokens_per_s", "first_p50_s", "first_p99_s", "token_p50_ms", "token_p99_ms")


def measure(way, backend, arguments):
    """The numbers of one way, a dict; or the error text if a process failed."""
    command = own_process.command("serve_model", way, arguments.size, arguments.slots)
    environment = own_process.environment(backend)
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        url = server.stdout.readline().strip()
        if not url:
            return f"The server of {way} did not start."
        result = own_process.run(None, "serve_load", url, arguments.requests, arguments.rate)
        if result.returncode:
            return result.stderr[-2000:]
        return json.loads(result.stdout.splitlines()[-1])
    finally:
        server.stdin.close()  # ends it
        server.wait(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["s", "tiny"], default="s", help="Small-Small, or two layers of width 64.")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2.0, help="Requests per second, on average.")
    parser.add_argument("--slots", type=int, default=16, help="The most requests that are decoded at a time.")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    record.add_options(parser)
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.requests} requests, {arguments.rate:g} per second, {arguments.slots} slots")
    for heading in ("backend", "way"):
        table.add_column(heading)
    for heading in ("tokens/s", "first token p50, s", "p99, s", "per token p50, ms", "p99, ms"):
        table.add_column(heading, justify="right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        measured = {}
        for way in arguments.ways:
            result = measure(way, backend, arguments)
            if isinstance(result, str):
                table.add_row(backend, way, "failed")
                print(result, file=sys.stderr)
                continue
            measured[way] = {field: result[field] for field in FIELDS}
            table.add_row(backend, way, *(f"{value:,.2f}" for value in measured[way].values()))
        ours = measured.pop("continuous", None)
        if ours:
            peers = [{"program": way, **numbers} for way, numbers in measured.items()]
            row = {"topic": "Requests over HTTP", "backend": backend, "size": arguments.size, "slots": arguments.slots}
            row |= {"requests": arguments.requests, "rate": arguments.rate}
            record.record(arguments, [{**row, **ours, "peer": peers}])
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
