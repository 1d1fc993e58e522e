"""Many answers to one document: one call of `score` with all, beside a call for each.

    python benchmarks/multiple_choice.py

Small-Small with 32,000 pieces and random weights, in float32. The document has 2,000 tokens, the answers 2 to 12. Calls
alternate: one with all answers, then `--singles` with one answer each, so that other work of the machine delays both.
`share` is the seconds of the one call, divided by the mean single call times the number of answers.
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

MOST = 0.15  # of a call for each


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=2000, help="Of the document.")
    parser.add_argument("--singles", type=int, default=5, help="Calls with one answer, per call with all.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    record.add_options(parser)
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.answers} answers to a document of {arguments.tokens:,} tokens")
    for heading in ("backend", "all in one call, s", "one answer, s", "share"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for backend in (name for name in arguments.backends if importlib.util.find_spec(name)):
        counts = (arguments.answers, arguments.tokens, arguments.singles, arguments.repeats)
        result = own_process.run(backend, "score_answers", *counts)
        if result.returncode:
            table.add_row(backend, "failed")
            print(result.stderr[-2000:], file=sys.stderr)
            continue
        together, alone = json.loads(result.stdout.splitlines()[-1])
        single = statistics.mean(alone)
        share = statistics.mean(together) / (single * arguments.answers)
        table.add_row(backend, f"{statistics.mean(together):.2f}", f"{single:.2f}", f"{share:.3f}")
        row = {"topic": "Many answers to one document", "backend": backend, "answers": arguments.answers}
        row |= {"tokens": arguments.tokens, "seconds": together, "seconds_single": alone, "share": share}
        aims = [{"field": "share", "of": None, "at_most": MOST}]
        record.record(arguments, [{**row, "aim": aims}])
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
