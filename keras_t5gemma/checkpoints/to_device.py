"""Arrays to tensors on the backend's device, without a copy if that is the CPU."""

import keras

from keras_t5gemma.checkpoints.tensor_source import DTYPES


def to_tensor(array, variable=None):
    """Wraps an array that the caller owns as a tensor without copying, if the device is the CPU; else a copy there.

    Keras's own conversion makes one copy on JAX and TensorFlow and two on PyTorch, which for the embedding of a large
    vocabulary is what decides how much memory loading takes.
    """
    backend = keras.config.backend()
    bits = array.view("int16") if array.dtype == DTYPES["BF16"] else array  # numpy shares no bfloat16 with others
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
    # With a layout straight to the shards: Keras would put the whole tensor onto the first device before.
    return jax.device_put(array) if layout is None else keras.distribution.distribute_tensor(array, layout)
