"""Multiple choice by lm-evaluation-harness: `kt.HarnessLM` beside the harness's own `HFLM`, PyTorch beside PyTorch.

    python benchmarks/harness.py

Small-Small with 32,000 pieces and random weights, in float32, written to a folder that `HFLM` reads. A context is a
text of about 2,000 tokens with four options of one to six words, so that there are four requests per context. Both
answer the same requests in turn, in one process, with the same batch size. Results that differ by more than 1e-4 nats
are an error.
"""

import argparse
import json
import statistics
import sys

import own_process
import record
from rich.console import Console
from rich.table import Table

LEAST = 3  # times the requests per second of HFLM
TOLERANCE = 1e-4  # nats
PEER = "lm-eval's HFLM"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--options", type=int, default=4, help="Of each context.")
    parser.add_argument("--tokens", type=int, default=2000, help="Of a context, on average.")
    parser.add_argument("--batch", type=int, default=4, help="The batch size of both.")
    parser.add_argument("--repeats", type=int, default=3)
    record.add_options(parser)
    arguments = parser.parse_args()
    counts = (arguments.contexts, arguments.options, arguments.tokens)
    result = own_process.run("torch", "harness_choices", *counts, arguments.batch, arguments.repeats)
    if result.returncode:
        sys.exit(result.stderr[-2000:])
    requests, seconds, peers_seconds, difference, unequal = json.loads(result.stdout.splitlines()[-1])
    if not difference <= TOLERANCE or unequal:
        sys.exit(f"The results differ: by up to {difference:.2g} nats, and {unequal} of {requests} in `is_greedy`.")
    rates, peers_rates = ([requests / one for one in times] for times in (seconds, peers_seconds))
    title = f"{arguments.contexts} texts of {arguments.tokens:,} tokens, {arguments.options} options each"
    table = Table(title=title)
    for heading in ("program", "requests per second", "ratio"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    ours, peers = statistics.median(rates), statistics.median(peers_rates)
    table.add_row("HarnessLM", f"{ours:.2f}", f"{ours / peers:.2f}")
    table.add_row("HFLM", f"{peers:.2f}", "")
    Console(width=120).print(table)
    print(f"The largest difference of log-likelihoods is {difference:.1e} nats.")
    row = {"topic": "Multiple choice by lm-evaluation-harness", "backend": "torch", "options": arguments.options}
    row |= {"tokens": arguments.tokens, "contexts": arguments.contexts, "batch": arguments.batch}
    row |= {"requests_per_s": rates, "difference_nats": difference}
    peer = {"program": PEER, "requests_per_s": peers_rates}
    aims = [{"field": "requests_per_s", "of": PEER, "at_least": LEAST}]
    record.record(arguments, [{**row, "peer": [peer], "aim": aims}])


if __name__ == "__main__":
    main()
