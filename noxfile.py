"""`nox -s tests` runs the tests on each backend in turn, `nox -s lint types` the linters and the type checker, in the
environment that nox runs in. `nox -s full` runs the slow tests, too, on all backends rather than on one.

One environment holds all three backends: to make three of them would take three times as long and test nothing more.
`lowest` and `newest` need other versions, so they make environments of their own, by uv, and download much.
"""

import os
import sys
from pathlib import Path

import nox

BACKENDS = ("jax", "tensorflow", "torch")

nox.options.sessions = ["lint", "types", "tests"]


# In the order of tests/conftest.py: by itself loadfile leaves files with few tests, slow ones among them, for last.
ORDER = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
HEADS = ("git+https://github.com/keras-team/keras", "git+https://github.com/keras-team/keras-hub")


def environment(backend):
    return {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}


@nox.session(venv_backend="none")
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def tests(session, backend):
    """What every change must pass; `nox -s "tests(jax)" -- -k masks` passes what follows `--` to pytest.

    Each backend runs all tests that are quick, and every third of the slow ones, so that together they run all.

    Two processes: most of the time goes into compiling tiny models, which takes one core and up to 2 GB. A file's tests
    stay together, since they share their models. Tests marked `once` run in PyTorch's session only, the shortest.
    """
    run(session, backend, "not elsewhere")


@nox.session(venv_backend="none")
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def full(session, backend):
    """All tests on each backend: before a release, on GitHub for each change. Half an hour a backend on two cores."""
    run(session, backend)


def run(session, backend, *marks):
    marks = " and ".join(["not gpu", "not network", *marks, *(["not once"] if backend != "torch" else [])])
    slowest = ("--durations=25", "--durations-min=5")
    options = ("-m", marks, *slowest, *session.posargs)
    session.run(sys.executable, "-m", "pytest", *ORDER, *options, env=environment(backend))


@nox.session(venv_backend="none")
def quick(session):
    """Tests that are not marked slow, on one backend: KERAS_BACKEND, or JAX."""
    marks = "not slow and not gpu and not network"
    backend = os.environ.get("KERAS_BACKEND", "jax")
    session.run(sys.executable, "-m", "pytest", *ORDER, "-m", marks, *session.posargs, env=environment(backend))


@nox.session(venv_backend="none")
def coverage(session):
    """Lines of the package that the tests of one backend run, KERAS_BACKEND or JAX: a report, without a threshold.

    It takes about a third longer than the tests. Processes that tests start are not counted.
    """
    backend = os.environ.get("KERAS_BACKEND", "jax")
    report = ("--cov=keras_t5gemma", "--cov-report=term:skip-covered", "--cov-report=html:build/coverage")
    session.run(sys.executable, "-m", "pytest", *ORDER, *report, *session.posargs, env=environment(backend))


@nox.session(venv_backend="none")
def lint(session):
    """Errors, style and formatting."""
    session.run(sys.executable, "-m", "ruff", "check", ".")
    session.run(sys.executable, "-m", "ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session):
    """Types of the folders that handle no tensors; pyproject.toml lists them."""
    session.run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable)


@nox.session(venv_backend="none")
def docs(session):
    """The site, into build/site: `pip install -e '.[docs]'` first; `-- zensical` builds with Zensical.

    A warning is an error. Zensical reads mkdocs.yml, too, and is where MkDocs and its theme go on.
    """
    session.run(sys.executable, "docs/generate.py")
    session.run(sys.executable, "-m", *(session.posargs or ["mkdocs"]), "build", "--strict")


@nox.session(venv_backend="none")
def api(session):
    """Writes tests/api/public_api.txt again, after a change of the public surface that is meant."""
    session.run(sys.executable, "docs/surface.py", "tests/api/public_api.txt")


@nox.session(venv_backend="uv", python="3.11")
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def lowest(session, backend):
    """Tests with the oldest versions that pyproject.toml allows."""
    # The tests pin PyTorch, their oracle: here it is the oldest, too.
    (torch,) = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["torch"]
    overrides = Path(session.create_tmp()) / "overrides.txt"
    overrides.write_text(torch.replace(">=", "=="), encoding="utf-8")
    session.install("--resolution", "lowest-direct", "--override", str(overrides), "-e", ".[test]")
    session.run("python", "-m", "pytest", *ORDER, *session.posargs, env=environment(backend))


@nox.session(venv_backend="uv")
@nox.parametrize("versions", ["releases", "heads"], ids=["releases", "heads"])
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def newest(session, backend, versions):
    """Tests with the newest Keras, keras-hub and JAX: releases and candidates, or the heads of their repositories."""
    session.install("-e", ".[test]")
    packages = ("keras", "keras-hub") if versions == "releases" else HEADS
    session.install("--upgrade", "--prerelease", "allow", *packages, "jax")
    session.run("python", "-m", "pytest", *ORDER, *session.posargs, env=environment(backend))
