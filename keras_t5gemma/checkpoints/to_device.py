"""Arrays to tensors on the backend's device, without a copy if the device is the CPU."""

import keras

from keras_t5gemma.checkpoints.tensor_source import DTYPES


def to_tensor(array, variable=None):
    """Converts an array to a tensor on the backend's device. On the CPU the tensor shares the array's memory.

    Keras's own conversion makes one copy on JAX and TensorFlow and two on PyTorch. For the embedding of a large
    vocabulary these copies decide how much memory loading takes.

    Args:
        array: a numpy array, which the caller must not change afterwards.
        variable: the `keras.Variable` that will be assigned, for its layout under a `keras.distribution`; or None.

    Returns:
        A tensor of the backend.
    """
    backend = keras.config.backend()
    bits = array.view("int16") if array.dtype == DTYPES["BF16"] else array  # bfloat16 is not a dtype that numpy shares
    if backend == "torch":
        import torch

        return torch.from_numpy(bits).view(torch.bfloat16) if bits is not array else torch.from_numpy(array)
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.device("CPU"):
            tensor = tf.experimental.dlpack.from_dlpack(bits.__dlpack__())
            return tf.bitcast(tensor, tf.bfloat16) if bits is not array else tensor
    import jax

    layout = getattr(variable, "_layout", None)
    # With a layout, straight to the shards: Keras would first put the whole tensor onto the first device.
    return jax.device_put(array) if layout is None else keras.distribution.distribute_tensor(array, layout)
