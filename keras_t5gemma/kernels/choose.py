"""Selects the implementation of an operation: the backend's own, or the plain one in `keras.ops`."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import keras

_overrides: dict[str, str | None] = {}


def implementation(package: str) -> ModuleType:
    """The module that implements an operation on the current backend.

    Args:
        package: the operation's package, e.g. "keras_t5gemma.kernels.attention". It has a module `reference`, and one
            module for each backend ("jax", "tensorflow", "torch") with its own implementation.

    Returns:
        The module.
    """
    return _module(package, _overrides.get(package) or keras.config.backend())


@contextlib.contextmanager
def using(package: str, name: str) -> Iterator[None]:
    """A context in which an operation runs by the named module on any backend. For tests and benchmarks.

    Functions that were compiled earlier keep their implementation.

    Args:
        package: the operation's package, as for `implementation`.
        name: "reference", "jax", "tensorflow" or "torch".
    """
    previous = _overrides.get(package)
    _overrides[package] = name
    try:
        yield
    finally:
        _overrides[package] = previous


@functools.cache
def _module(package: str, name: str) -> ModuleType:
    if importlib.util.find_spec(f"{package}.{name}") is None:
        name = "reference"
    return importlib.import_module(f"{package}.{name}")
