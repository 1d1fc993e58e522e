"""The devices and the processes of a recipe."""

import contextlib
import shutil

import keras
import numpy as np

from keras_t5gemma.models.distribution import layout_map
from keras_t5gemma.training.resume_files import step_of, steps_in


def distribution(hardware):
    """A context in which models are laid out over the devices of a `HardwareSection`.

    Raises:
        ValueError: where the backend or the machine has no such devices.
    """
    if not hardware.mesh:
        return contextlib.nullcontext()
    if keras.config.backend() != "jax":
        raise ValueError(
            f"[hardware] mesh: `keras.distribution` works on JAX alone. Received: backend {keras.config.backend()!r}. "
            f"Choose --backend jax, or leave `mesh` out for one device."
        )
    if hardware.processes > 1:
        # Addresses and numbers are in the environment: KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES, _PROCESS_ID.
        keras.distribution.initialize()
    names = ("batch", "model")[: len(hardware.mesh)]
    mesh = keras.distribution.DeviceMesh(hardware.mesh, names)
    layouts = layout_map(mesh, fully_sharded=hardware.fully_sharded)
    parallel = keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=hardware.processes == 1
    )
    return parallel.scope()


def process(hardware):
    """Which of the processes this is, from 0.

    Raises:
        ValueError: where there are more or fewer than the recipe says.
    """
    if hardware.processes == 1:
        return 0
    import jax  # `keras.distribution` has processes there alone

    if jax.process_count() != hardware.processes:
        raise ValueError(
            f"[hardware] processes: the recipe says {hardware.processes}, and {jax.process_count()} have met."
        )
    return jax.process_index()


def agree_on_checkpoint(folder):
    """Has all processes go on from the newest checkpoint that each of them has.

    Each writes its own, and one may have been killed as it wrote. As all save at the same steps, none lacks an older
    one.

    Args:
        folder: of this process's checkpoints; newer ones than that are removed.
    """
    from jax.experimental import multihost_utils  # `keras.distribution` has processes on JAX alone

    newest = max((step_of(path) for path in steps_in(folder)), default=0)
    common = int(np.min(multihost_utils.process_allgather(np.array(newest))))
    for path in steps_in(folder):
        if step_of(path) > common:
            shutil.rmtree(path)
