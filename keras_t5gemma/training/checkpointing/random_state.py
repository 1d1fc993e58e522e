"""Captures and restores the state of all global random generators."""

import base64
import random

import keras
import numpy as np

from keras_t5gemma._keras_internals import global_seed_generator, variable_array


def random_state() -> dict:
    """The state of Python's `random`, and of numpy's, Keras's and PyTorch's global generators, JSON-ready."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    generator = global_seed_generator()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "keras": None if generator is None else np.asarray(variable_array(generator.state)).tolist(),
        "torch": _torch_random_state(),
    }


def set_random_state(state: dict) -> None:
    """Sets the state of all generators to a result of `random_state`."""
    if state["keras"] is not None:
        keras.random.uniform(())  # creates the generator if it does not exist yet
        generator = global_seed_generator()
        generator.state.assign(np.array(state["keras"], generator.state.dtype))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, "uint32"), *rest))
    set_torch_random_state(state)


def set_torch_random_state(state: dict) -> None:
    """Sets PyTorch's part of a result of `random_state`, if PyTorch is the backend and was the backend then."""
    if keras.config.backend() != "torch" or not state["torch"]:
        return
    import torch

    cpu, *devices = (torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for text in state["torch"])
    torch.set_rng_state(cpu)
    if len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)


def _torch_random_state() -> list[str]:
    """PyTorch's states, of the CPU and of each GPU: on PyTorch Keras's dropout draws from these, whatever its seed."""
    if keras.config.backend() != "torch":
        return []
    import torch

    return [
        base64.b64encode(state.numpy().tobytes()).decode()
        for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())
    ]
