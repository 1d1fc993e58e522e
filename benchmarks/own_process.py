"""Runs a file of `programs/` in a separate process, on a given backend."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


def command(name, *arguments):
    """The command line of a program."""
    return [sys.executable, str(PROGRAMS / f"{name}.py"), *map(str, arguments)]


def environment(backend=None):
    """This process's environment, with the working directory first on the path, as for `python -c`."""
    path = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(path)}
    return {**changed, "KERAS_BACKEND": backend} if backend else changed


def run(backend, name, *arguments, check=False):
    """A `subprocess.CompletedProcess` with what the program printed."""
    return subprocess.run(
        command(name, *arguments), check=check, capture_output=True, text=True, env=environment(backend)
    )
