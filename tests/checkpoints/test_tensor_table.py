"""The table against what the libraries really build; the published counts are in `test_presets`."""

import pytest
from helpers.peers import hf_gemma2, hf_t5gemma, tiny_config, tiny_gemma_stack
from helpers.tiny import backbone_of

from keras_t5gemma.checkpoints.tensor_table import TABLE, parameter_count, tensor_specs

CONFIGS = {
    "balanced": tiny_config(),
    "unbalanced": tiny_config(balanced=False),
    "untied": tiny_config(balanced=False, tie_embeddings=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_table_has_the_variables_of_our_model_and_no_others(name):
    backbone = backbone_of(CONFIGS[name])
    assert {tensor.path: tensor.shape for tensor in tensor_specs(CONFIGS[name])} == {
        variable.path: tuple(variable.shape) for variable in backbone.weights
    }
    assert parameter_count(CONFIGS[name]) == backbone.count_params()


@pytest.mark.parametrize("name", CONFIGS)
def test_table_has_the_tensors_of_transformers_t5gemma_and_no_others(name):
    expected = {key: tuple(value.shape) for key, value in hf_t5gemma(CONFIGS[name]).named_parameters()}
    assert {tensor.name: tensor.stored_shape for tensor in tensor_specs(CONFIGS[name])} == expected


def test_table_has_the_tensors_of_transformers_gemma2_and_no_others():
    stack = tiny_gemma_stack()
    expected = {key: tuple(value.shape) for key, value in hf_gemma2(stack).named_parameters()}
    table = tensor_specs(tiny_config(encoder=stack, decoder=stack))
    for side in ("encoder", "decoder"):
        rows = [tensor for tensor in table if tensor.stack == side and tensor.gemma2 is not None]
        assert {tensor.gemma2: tensor.stored_shape for tensor in rows} == expected


def test_table_has_a_self_attention_row_for_each_of_cross_attention():
    by_path = {row.path: row for row in TABLE}
    cross = [row for row in TABLE if "cross_attention" in row.path]
    assert len(cross) == 6
    for row in cross:
        namesake = by_path[row.path.replace("cross_attention", "self_attention")]
        assert namesake.letters == row.letters.replace("E", "D")
        assert namesake.gemma2 is not None
