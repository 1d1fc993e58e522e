"""Where arrays are computed, for what has a faster form on a CPU."""

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
