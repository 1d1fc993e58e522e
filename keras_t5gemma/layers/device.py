"""Where arrays are computed, for what has a faster form on a CPU."""

import keras


def on_cpu(x):
    """Whether tensor x is computed on the CPU."""
    backend = keras.config.backend()
    if backend == "torch":
        return x.device.type == "cpu"
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.config.list_physical_devices("GPU")
    import jax

    return jax.default_backend() == "cpu"
