"""The gated feed-forward of Gemma 2."""

import keras
from keras import ops

from keras_t5gemma.config import StackConfig
from keras_t5gemma.kernels.float16 import clip_to_range
from keras_t5gemma.kernels.rematerialization import recomputed
from keras_t5gemma.layers.initialization import as_rows, dense


class FeedForward(keras.layers.Layer):
    """`down(gelu_tanh(gate(x)) * up(x))`, without biases.

    Args:
        config: the stack's `StackConfig`; `hidden_dim` D and `intermediate_dim` F are the kernels' sizes.
        **kwargs: `dtype` and `name`.
    """

    def __init__(self, config: StackConfig, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.gate_dense = dense(config.intermediate_dim, "gate", config, self.dtype_policy)
        self.up_dense = dense(config.intermediate_dim, "up", config, self.dtype_policy)
        self.down_dense = dense(config.hidden_dim, "down", config, self.dtype_policy)

    def build(self, input_shape):
        """Creates the kernels: gate and up [D, F], down [F, D]."""
        self.gate_dense.build(input_shape)
        self.up_dense.build(input_shape)
        self.down_dense.build((*input_shape[:-1], self.gate_dense.units))

    def call(self, x):
        """Maps [B, T, D] to [B, T, D]."""
        rows = as_rows(x)
        down = self.down_dense(recomputed(_gated, self.gate_dense(rows), self.up_dense(rows)))
        return ops.reshape(down, ops.shape(x))

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape


def _gated(gate, up):
    return clip_to_range(keras.activations.gelu(clip_to_range(gate), approximate=True) * clip_to_range(up))
