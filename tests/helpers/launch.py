"""Python scripts as processes of their own, which find each other or have several devices."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras

PROCESSES = 2
# Compiling is most of the time here.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def start(script, *arguments, devices=1, **environment):
    """`python script arguments`, which sees that many devices of the CPU on JAX."""
    on_jax = keras.config.backend() == "jax"
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}" if on_jax else ""
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": python_path(), **environment}
    command = [sys.executable, str(script), *map(str, arguments)]
    # A pipe that nobody empties would hold it up. The process keeps the file open, as long as it is looked at.
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    process.log = log
    return process


def finish(*processes, timeout=300):
    """Waits for all; fails with the output of one that did, for which the others might wait for ever."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > end:
            break
        time.sleep(0.05)
    faulty = [process for process in processes if process.poll()] or [p for p in processes if p.poll() is None]
    for process in processes:
        process.kill()
    assert not faulty, f"{faulty[0].args}: {faulty[0].poll()}\n{output(faulty[0])}"


def output(process):
    """The end of what a process wrote."""
    process.log.seek(0)
    return process.log.read()[-8000:]


def free_address():
    """Where processes can meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def python_path():
    """What lets a program import `helpers`."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
