"""Lookups in a table of embeddings, and their gradient."""

import keras
import numpy as np
import pytest
from helpers.gradients import gradients
from helpers.one_step import compiled_step
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.kernels.embedding.lookup import look_up

IDS = np.array([[3, 59, 0, 3], [3, 17, 59, 4]])


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("only_gradient", [False, True])
def test_rows_and_the_sum_of_their_gradients(dtype, tied, only_gradient):
    embedding = keras.layers.ReversibleEmbedding(60, 8, tie_weights=tied, dtype=dtype, autocast=not tied)
    embedding.build()
    # Numbers that bfloat16 holds.
    table, factors = (
        np.random.default_rng(i).integers(-4, 5, shape).astype("float32") for i, shape in ((0, (60, 8)), (1, (2, 4, 8)))
    )

    def weighted(table):
        value = ops.cast(ops.convert_to_tensor(table), embedding.variable_dtype)
        with keras.StatelessScope(state_mapping=[(embedding.embeddings, value)]):
            rows = ops.cast(look_up(embedding, ops.convert_to_tensor(IDS), only_gradient=only_gradient), "float32")
        return ops.sum(rows * ops.convert_to_tensor(factors))

    expected = np.zeros_like(table)
    np.add.at(expected, IDS, factors)
    np.testing.assert_allclose(float(weighted(ops.convert_to_tensor(table))), (table[IDS] * factors).sum(), rtol=1e-6)
    np.testing.assert_array_equal(gradients(weighted, table)[0], expected)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="PyTorch's is dense; TensorFlow's gradients are rows")
def test_training_step_has_memory_for_one_gradient_of_a_tables_size():
    """The encoder's table has to wait for its own until the decoder's, of loss and lookups, has been applied."""
    stack = {"num_layers": 1, "hidden_dim": 64, "intermediate_dim": 64, "num_query_heads": 1, "num_key_value_heads": 1}
    lm = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone(*[stack | {"head_dim": 8}] * 2, vocabulary_size=20_000))
    lm.compile("adamw")
    names = [f"{side}_{what}" for side in ("encoder", "decoder") for what in ("token_ids", "padding_mask")]
    ids = np.ones((2, 4), "int32")
    memory = compiled_step(lm, (dict.fromkeys(names, ids), ids, np.ones((2, 4), "float32"))).memory_analysis()
    assert memory.temp_size_in_bytes < 1.6 * 4 * 20_000 * 64
