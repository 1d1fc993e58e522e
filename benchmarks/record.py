"""Rows for `results/`: numbers with their date, commit, machine, versions and command.

    python benchmarks/train.py --record --idle yes
    python benchmarks/report.py

A program with `--record` appends its rows to the file of its name. `report.py` then updates README.md's tables.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rows import problems

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
VARIABLES = ("TF_NUM_INTEROP_THREADS", "TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "GLIBC_TUNABLES", "XLA_FLAGS")
# Of this process at its start: a program may bind itself to one core later.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PACKAGES = ("keras", "keras-hub", "jax", "tensorflow", "torch", "transformers")


def add_options(parser):
    """`--record` and `--idle`."""
    parser.add_argument("--record", action="store_true", help="Append rows to results/.")
    parser.add_argument("--idle", choices=["yes", "no"], help="For --record: whether the machine had no other work.")


def record(arguments, rows):
    """Appends rows to the results of the running program, if `--record` asks for it.

    Args:
        arguments: of the command line.
        rows: dicts with `topic`, `backend` and the topic's own fields; "keras-t5gemma" is the `program` if none is
            given, and `peer` and `aim` are empty.
    """
    if not arguments.record:
        return
    file, common = Path(sys.argv[0]).stem, circumstances(arguments)
    complete = [{"program": "keras-t5gemma", "peer": [], "aim": [], **common, **row} for row in rows]
    for row in complete:
        if found := problems(row, file):
            raise ValueError(f"{found} in {row}")
    with (RESULTS / f"{file}.jsonl").open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in complete)


def circumstances(arguments):
    """The fields that are equal in all rows of a run."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "command": command(),
        "idle": {"yes": True, "no": False, None: None}[arguments.idle],
    }


def environment():
    """Variables of the environment that change what is measured, as `NAME=value NAME=value`; "" if none is set."""
    return " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)


def commit():
    """The commit that is checked out, with "-changed" if the package differs from it."""
    try:
        found = _output("git", "rev-parse", "HEAD")
        changed = _output("git", "status", "--porcelain", "--", str(FOLDER.parent / "keras_t5gemma"))
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}-changed" if changed else found


def machine():
    """The CPU's model and cores, and the GPU's name."""
    names = [
        line.partition(":")[2].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    gpu = None
    if shutil.which("nvidia-smi"):
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], check=False, capture_output=True, text=True
        )
        gpu = ", ".join(found.stdout.splitlines()) or None if found.returncode == 0 else None
    return {"cpu": names[0] if names else platform.processor() or None, "cores": CORES, "gpu": gpu}


def versions():
    """The versions of Python and of the installed libraries."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command():
    """The command line, without the folders of paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def _output(*words):
    found = subprocess.run(words, check=True, capture_output=True, text=True, cwd=FOLDER)
    return found.stdout.strip()
