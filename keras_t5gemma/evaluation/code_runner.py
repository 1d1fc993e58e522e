"""Runs programs that a model wrote: each in a process of its own, with limits.

A program gets a new, empty current folder that is removed afterwards, an environment without the caller's variables,
only the standard library, no open files of the caller, no input, and limits of time, memory, size of files and number
of processes. Its process group is killed at the end.

This is no sandbox. A program can read what the user can read, write and delete outside of its folder, and use the
network. Run code of a model that you do not trust in a container or a virtual machine without network and credentials.
"""

import contextlib
import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import tempfile

# Runs in the new process: limits first, then the program. A program that ends early, e.g. by `exit(0)`, does not reach
# the last line, and the word there is not among the program's names.
_RUNNER = """
def run():
    import resource, sys
    seconds, memory, word = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    sys.argv[:] = [""]
    def limit(what, most):
        resource.setrlimit(what, (most, most))
    limit(resource.RLIMIT_CPU, seconds)
    limit(resource.RLIMIT_FSIZE, 1_000_000)
    limit(resource.RLIMIT_CORE, 0)
    if sys.platform != "darwin":  # which does not keep the first of these
        limit(resource.RLIMIT_AS, memory)
        limit(resource.RLIMIT_NPROC, 0)  # not for root
    import os
    code = sys.stdin.buffer.read().decode()
    result = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})
    result.write(word)
    result.close()
run()
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Attributes:
        seconds: of wall-clock time, and of processor time.
        memory: bytes of address space.
    """

    seconds: int = 10
    memory: int = 2**30


def runs_to_its_end(program: str, limits: Limits | None = None) -> bool:
    """Whether a program, such as a function with its tests, runs to its last line without an error.

    Args:
        program: Python's source.
        limits: a `Limits`, or None for 10 seconds and 1 GiB.

    Returns:
        False for any error, a limit that is reached, and an early exit.

    Raises:
        OSError: on Windows, which has no such limits.
    """
    if os.name != "posix":
        raise OSError("Code of a model runs with limits that only Linux, macOS and other POSIX systems have.")
    limits = limits or Limits()
    word = secrets.token_hex(16)
    arguments = ["-I", "-S", "-B", "-c", _RUNNER, str(limits.seconds), str(limits.memory), word]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8"},
            close_fds=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(program.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            # The program, and what it has started in its group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return output.decode(errors="replace") == word
