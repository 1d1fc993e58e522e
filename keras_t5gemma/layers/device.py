"""Where arrays are computed, for what has a faster form there."""

import keras


def on_cpu(x):
    """Whether tensor x is computed on the CPU."""
    backend = keras.config.backend()
    if backend == "torch":
        return x.device.type == "cpu"
    if backend == "tensorflow":
        import tensorflow as tf

        return all(device.device_type == "CPU" for device in tf.config.list_physical_devices())
    import jax

    return jax.default_backend() == "cpu"


def jax_on_gpu():
    """Whether JAX computes on a GPU."""
    import jax

    return jax.default_backend() == "gpu"
