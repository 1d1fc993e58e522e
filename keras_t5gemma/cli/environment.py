"""`env`: versions, backend and devices for bug reports. It works even if a library does not."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

PACKAGES = (
    "keras-t5gemma",
    "keras",
    "keras-hub",
    "jax",
    "jaxlib",
    "tensorflow",
    "tensorflow-text",
    "torch",
    "numpy",
    "ml-dtypes",
    "sentencepiece",
    "grain",
    "safetensors",
    "h5py",
    "huggingface-hub",
    "kagglehub",
)
# Runs in a process of its own: a library may end the process or hang.
_DEVICES = """
import keras
name = keras.backend.backend()
if name == "jax":
    import jax
    names = [f"{device.device_kind} ({device})" for device in jax.devices()]
elif name == "tensorflow":
    import tensorflow as tf
    devices = [d for kind in ("TPU", "GPU", "CPU") for d in tf.config.list_physical_devices(kind)]
    details = [tf.config.experimental.get_device_details(d) if d.device_type == "GPU" else {} for d in devices]
    names = [detail.get("device_name", d.device_type) + f" ({d.name})" for d, detail in zip(devices, details)]
elif name == "torch":
    import torch
    names = [torch.cuda.get_device_name(i) + f" (cuda:{i})" for i in range(torch.cuda.device_count())]
    names += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
else:
    names = ["unknown"]
print("\\nKERAS_T5GEMMA", name, keras.config.floatx(), *names, sep="\\t")
"""
_TIMEOUT = 120  # seconds


def environment(backend: str | None = None) -> Iterator[tuple[str, str]]:
    """Facts about this Python, its packages and its devices.

    Args:
        backend: a backend's name, or None for Keras's choice.

    Yields:
        `(name, text)` pairs.
    """
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    for package in PACKAGES:
        yield package, _version(package)
    chosen = backend or os.environ.get("KERAS_BACKEND") or ("jax" if importlib.util.find_spec("jax") else None)
    yield "backend asked for", chosen or "what Keras chooses"
    yield from _backend_facts(chosen)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backend_facts(backend: str | None) -> Iterator[tuple[str, str]]:
    """Facts about the backend, from a process of its own: importing it may fail or hang."""
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **({"KERAS_BACKEND": backend} if backend else {})}
    try:
        result = subprocess.run(
            [sys.executable, "-c", _DEVICES],
            capture_output=True,
            text=True,
            check=False,
            env=variables,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        yield "backend", f"does not answer: nothing in {_TIMEOUT} seconds"
        return
    for line in result.stdout.splitlines():
        mark, *facts = line.split("\t")
        if mark == "KERAS_T5GEMMA":
            name, floatx, *devices = facts
            yield from (("backend", name), ("floatx", floatx), ("devices", ", ".join(devices)))
            return
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    yield "backend", f"does not work (exit status {result.returncode}): {errors[-1] if errors else 'it said nothing'}"
