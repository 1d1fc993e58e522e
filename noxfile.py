"""`nox -s tests` runs the tests on each backend in turn, `nox -s lint` the linters, in the environment nox runs in.

One environment holds all three backends: to make three of them would take three times as long and test nothing more.
"""

import sys

import nox

BACKENDS = ("jax", "tensorflow", "torch")

nox.options.sessions = ["lint", "tests"]


@nox.session(venv_backend="none")
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def tests(session, backend):
    """All tests on one backend; `nox -s "tests(jax)" -- -k masks` passes what follows `--` to pytest.

    Two processes: most of the time goes into compiling tiny models, which takes one core and up to 2 GB. A file's tests
    stay together, since they share their models.
    """
    environment = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    # In the order of tests/conftest.py: by itself loadfile leaves files with few tests, slow ones among them, for last.
    order = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    session.run(sys.executable, "-m", "pytest", *order, *session.posargs, env=environment)


@nox.session(venv_backend="none")
def lint(session):
    """Errors, style and formatting."""
    session.run(sys.executable, "-m", "ruff", "check", ".")
    session.run(sys.executable, "-m", "ruff", "format", "--check", ".")
