"""Which implementation of an operation runs: the backend's own, or the plain one in `keras.ops`."""

import contextlib
import functools
import importlib
import importlib.util

import keras

_overrides = {}


def implementation(package):
    """The module of an operation for the backend that runs.

    Args:
        package: the operation's, e.g. "keras_t5gemma.kernels.attention": it has a module `reference`, and one named
            after each backend ("jax", "tensorflow", "torch") that has an implementation of its own.

    Returns:
        The module.
    """
    return _module(package, _overrides.get(package) or keras.config.backend())


@contextlib.contextmanager
def using(package, name):
    """Within it, an operation runs by the module of this name, whatever the backend. For tests and benchmarks.

    What was compiled before keeps what it was compiled with.

    Args:
        package: as for `implementation`.
        name: "reference", "jax", "tensorflow" or "torch".
    """
    before = _overrides.get(package)
    _overrides[package] = name
    try:
        yield
    finally:
        _overrides[package] = before


@functools.cache
def _module(package, name):
    if importlib.util.find_spec(f"{package}.{name}") is None:
        name = "reference"
    return importlib.import_module(f"{package}.{name}")
