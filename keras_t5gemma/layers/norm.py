"""RMSNorm with a `1 + scale` weight, as Gemma stores it."""

import keras
from keras import ops

from keras_t5gemma.kernels.float16 import clip_to_range
from keras_t5gemma.kernels.rematerialization import recomputed
from keras_t5gemma.layers.initialization import FirstValue


class RMSNorm(keras.layers.Layer):
    """`x / sqrt(mean(x ** 2) + epsilon) * (1 + scale)` over the last axis, computed in float32.

    Args:
        epsilon: added to the mean square.
        **kwargs: `dtype` and `name`.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs):
        # No autocast: the scale is used in float32 for every compute dtype.
        super().__init__(autocast=False, **kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        """Creates `scale` [D], initially zero, so that the norm starts with weight one."""
        first = FirstValue(keras.initializers.Zeros(), "scale", layer=self)
        self.scale = self.add_weight(name="scale", shape=(input_shape[-1],), initializer=first)

    def call(self, x):
        """Normalizes [..., D] and returns it in the compute dtype."""
        return recomputed(self._normalize, x, ops.convert_to_tensor(self.scale))

    def _normalize(self, x, scale):
        x, weight = ops.cast(clip_to_range(x), "float32"), 1.0 + ops.cast(scale, "float32")
        return ops.cast(ops.rms_normalization(x, weight, axis=-1, epsilon=self.epsilon), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape
