"""What a layer's weights give where one works in another dtype than it keeps."""

import keras
import numpy as np
from keras import ops

from keras_t5gemma.config import StackConfig
from keras_t5gemma.layers.initialization import embedding

CONFIG = StackConfig(
    num_layers=1, hidden_dim=4, intermediate_dim=8, num_query_heads=2, num_key_value_heads=2, head_dim=2
)


class Lookup(keras.layers.Layer):
    """An embedding within a layer of no autocast, as a stack is."""

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.table = embedding(6, "table", CONFIG, self.dtype_policy, tied=True)

    def build(self, input_shape):
        self.table.build(input_shape)

    def call(self, ids):
        return self.table(ids)


def test_gradients_of_a_token_looked_up_often_in_mixed_bfloat16_add_up_in_float32():
    """512 ones: a sum in bfloat16 stops at 256, where the next larger number is 258."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Sequential([Lookup()])
        model.build((1, 512))
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss=lambda y, x: ops.sum(ops.cast(x, "float32")))
    before = model.get_weights()[0]
    model.train_on_batch(np.full((1, 512), 3), np.zeros((1, 512)))
    change = before - model.get_weights()[0]
    np.testing.assert_allclose(change[3], 512, rtol=1e-6)
    assert not change[[0, 1, 2, 4, 5]].any()
