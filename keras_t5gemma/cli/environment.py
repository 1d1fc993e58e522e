"""`env`: versions, backend and devices for bug reports. Does not fail if a library does."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys

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
# In a process of its own, so that a library that ends the process, or takes for ever, costs a line and no more.
_DEVICES = """
import keras
name = keras.backend.backend()
if name == "jax":
    import jax
    found = [f"{device.device_kind} ({device})" for device in jax.devices()]
elif name == "tensorflow":
    import tensorflow as tf
    devices = [d for kind in ("TPU", "GPU", "CPU") for d in tf.config.list_physical_devices(kind)]
    details = [tf.config.experimental.get_device_details(d) if d.device_type == "GPU" else {} for d in devices]
    found = [detail.get("device_name", d.device_type) + f" ({d.name})" for d, detail in zip(devices, details)]
elif name == "torch":
    import torch
    found = [torch.cuda.get_device_name(i) + f" (cuda:{i})" for i in range(torch.cuda.device_count())]
    found += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
else:
    found = ["unknown"]
print("\\nKERAS_T5GEMMA", name, keras.config.floatx(), *found, sep="\\t")
"""
_SECONDS = 120


def environment(backend=None):
    """Facts about this Python and what it computes with.

    Args:
        backend: a name, or None for what Keras would take.

    Yields:
        `(name, text)` pairs.
    """
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    for package in PACKAGES:
        yield package, _version(package)
    asked = backend or os.environ.get("KERAS_BACKEND") or ("jax" if importlib.util.find_spec("jax") else None)
    yield "backend asked for", asked or "what Keras chooses"
    yield from _computes_with(asked)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _computes_with(backend):
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **({"KERAS_BACKEND": backend} if backend else {})}
    try:
        result = subprocess.run(
            [sys.executable, "-c", _DEVICES],
            capture_output=True,
            text=True,
            check=False,
            env=variables,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield "backend", f"does not answer: nothing in {_SECONDS} seconds"
        return
    for line in result.stdout.splitlines():
        mark, *facts = line.split("\t")
        if mark == "KERAS_T5GEMMA":
            name, floatx, *devices = facts
            yield from (("backend", name), ("floatx", floatx), ("devices", ", ".join(devices)))
            return
    said = [line for line in result.stderr.splitlines() if line.strip()]
    yield "backend", f"does not work (exit status {result.returncode}): {said[-1] if said else 'it said nothing'}"
