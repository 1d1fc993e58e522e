"""The device that computes a tensor, for operations that have a faster form on some devices."""

import keras


def on_cpu(x) -> bool:
    """Whether tensor x is computed on the CPU."""
    backend = keras.config.backend()
    if backend == "torch":
        return x.device.type == "cpu"
    if backend == "tensorflow":
        import tensorflow as tf

        return all(device.device_type == "CPU" for device in tf.config.list_physical_devices())
    import jax

    return jax.default_backend() == "cpu"


def jax_on_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    import jax

    return jax.default_backend() == "gpu"


def devices_of_a_batch() -> tuple[str | None, int]:
    """The mesh axis along which batches are divided, and the number of devices along it.

    Returns:
        `(axis, count)`, or `(None, 1)` without a `keras.distribution`.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None, 1
    mesh, axis = distribution.device_mesh, distribution.batch_dim_name
    return axis, dict(zip(mesh.axis_names, mesh.shape, strict=True)).get(axis, 1)


def replicas() -> int:
    """The number of TensorFlow replicas whose gradients are summed; 1 on other backends.

    Keras takes the loss of each replica as a part of the mean.
    """
    if keras.config.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync
