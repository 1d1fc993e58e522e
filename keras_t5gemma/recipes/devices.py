"""The devices and the processes of a recipe."""

import contextlib

import keras

from keras_t5gemma.checkpoints.processes import process_count, process_index
from keras_t5gemma.models.sharding import layout_map
from keras_t5gemma.recipes.schema import HardwareSection


def distribution(hardware: HardwareSection) -> contextlib.AbstractContextManager:
    """A context in which models are sharded over the devices of a `HardwareSection`.

    Raises:
        ValueError: if the backend is not JAX, or the machine has other devices.
    """
    if not hardware.mesh:
        return contextlib.nullcontext()
    if keras.config.backend() != "jax":
        raise ValueError(
            f"[hardware] mesh: `keras.distribution` works only on JAX. Received: backend {keras.config.backend()!r}. "
            f"Choose --backend jax, or leave `mesh` out for one device."
        )
    if hardware.processes > 1:
        _connect_processes()
    names = ("batch", "model")[: len(hardware.mesh)]
    mesh = keras.distribution.DeviceMesh(hardware.mesh, names)
    layouts = layout_map(mesh, fully_sharded=hardware.fully_sharded)
    parallel = keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=hardware.processes == 1
    )
    return parallel.scope()


def process(hardware: HardwareSection) -> int:
    """The index of this process, from 0.

    Raises:
        ValueError: if there are more or fewer processes than the recipe says.
    """
    if hardware.processes == 1:
        return 0
    if process_count() != hardware.processes:
        raise ValueError(f"[hardware] processes: the recipe says {hardware.processes}, and {process_count()} have met.")
    return process_index()


def _connect_processes() -> None:
    """Connects the processes, unless they are connected: a program may run several recipes."""
    import jax  # `keras.distribution` supports several processes only on JAX

    if not jax.distributed.is_initialized():
        # Addresses and numbers are in the environment: KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES, _PROCESS_ID.
        keras.distribution.initialize()
