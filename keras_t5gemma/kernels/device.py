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


def devices_of_a_batch():
    """`(axis, count)`: the mesh's axis along which batches are divided, and the devices along it; or None and 1."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None, 1
    mesh, axis = distribution.device_mesh, distribution.batch_dim_name
    return axis, dict(zip(mesh.axis_names, mesh.shape, strict=True)).get(axis, 1)


def replicas():
    """Among how many devices TensorFlow adds gradients up: for Keras, the loss of each is a part of the mean."""
    if keras.config.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync
