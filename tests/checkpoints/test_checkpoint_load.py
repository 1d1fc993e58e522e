"""Folders into models: the same logits as transformers, and nothing loaded in silence."""

import ml_dtypes
import numpy as np
import pytest
from helpers.peers import hf_logits, hf_t5gemma, loud_inputs, tiny_config
from helpers.tiny import backbone_of
from keras import ops
from safetensors.numpy import load_file, save_file

from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.load import load_into
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

NAME = "model.decoder.layers.1.cross_attn.k_proj.weight"
PATH = "decoder/layer_1/cross_attention/key/kernel"


def change(folder, edit):
    """Rewrites a single-file folder with its tensors edited."""
    arrays = load_file(folder / "model.safetensors")
    edit(arrays)
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return CheckpointFolder(folder)


def weight(backbone, path=PATH):
    return ops.convert_to_numpy(next(v.value for v in backbone.weights if v.path == path))


def test_loaded_model_has_the_logits_of_transformers(sharded_folder, config):
    backbone = backbone_of(config)
    assert load_into(backbone, config, CheckpointFolder(sharded_folder)) == []
    inputs = loud_inputs(config)
    # The weights that are in the folder, with the window that transformers needs to see what it should.
    expected = hf_logits(hf_t5gemma(config), inputs)
    got = T5GemmaSeq2SeqLM(backbone).predict(inputs, verbose=0)
    keep = inputs["decoder_padding_mask"].astype(bool)
    assert np.abs(got - expected)[keep].max() < 1e-4 * np.abs(expected[keep]).max()


@pytest.mark.parametrize("variables", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_each_stored_dtype_loads_into_each_variable_dtype_rounded_once(tmp_path, stored, variables):
    config = tiny_config(num_layers=1)
    numpy_dtypes = {"bfloat16": ml_dtypes.bfloat16}
    generator = np.random.default_rng(0)
    arrays = {
        tensor.name: generator.standard_normal(tensor.stored_shape).astype(numpy_dtypes.get(stored, stored))
        for tensor in tensor_specs(config)
    }
    save_file(arrays, tmp_path / "model.safetensors")
    backbone = backbone_of(config, dtype=variables)
    load_into(backbone, config, CheckpointFolder(tmp_path))
    by_path = {variable.path: variable for variable in backbone.weights}
    for tensor in tensor_specs(config):
        expected = tensor.from_stored(arrays[tensor.name]).astype(numpy_dtypes.get(variables, variables))
        assert by_path[tensor.path].dtype == variables
        np.testing.assert_array_equal(ops.convert_to_numpy(by_path[tensor.path].value), expected)


def test_untied_projection_is_loaded(tmp_path):
    config = tiny_config(tie_embeddings=False)
    peer = hf_t5gemma(config)
    peer.save_pretrained(tmp_path)
    backbone = backbone_of(config)
    load_into(backbone, config, CheckpointFolder(tmp_path))
    np.testing.assert_array_equal(
        weight(backbone, "decoder/token_embedding/reverse_embeddings"), peer.lm_head.out_proj.weight.detach().numpy().T
    )


def test_redundant_tensors_are_ignored_and_listed(damaged, single_folder, config):
    redundant = {
        "lm_head.out_proj.weight": np.zeros((128, 32), "float32"),
        "model.encoder.rotary_emb.inv_freq": np.zeros(3, "float32"),
    }
    source = change(damaged(single_folder), lambda arrays: arrays.update(redundant))
    assert load_into(backbone_of(config), config, source) == sorted(redundant)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda arrays: arrays.pop(NAME),
            rf"1 tensor\(s\) missing, among them '{NAME}', expected with shape \(24, 40\)",
        ),
        (
            lambda arrays: arrays.update({"model.encoder.extra": np.zeros(3, "float32")}),
            r"model\.safetensors: 1 tensor\(s\) that this T5Gemma does not have.*'model\.encoder\.extra'",
        ),
        (
            lambda arrays: arrays.update({NAME: np.ascontiguousarray(arrays[NAME].T)}),
            rf"model\.safetensors: tensor '{NAME}' has shape \(40, 24\)\. Expected \(24, 40\)",
        ),
        (
            lambda arrays: arrays.update({NAME: arrays[NAME].astype("int32")}),
            rf"model\.safetensors: tensor '{NAME}' has dtype I32",
        ),
    ],
    ids=["missing", "extra", "misshaped", "integers"],
)
def test_folder_that_does_not_fit_is_refused_before_anything_is_assigned(damaged, single_folder, config, edit, message):
    backbone = backbone_of(config)
    before = [ops.convert_to_numpy(variable.value) for variable in backbone.weights]
    source = change(damaged(single_folder), edit)
    with pytest.raises(CheckpointError, match=message):
        load_into(backbone, config, source)
    for variable, value in zip(backbone.weights, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable.value), value)


def test_config_with_more_layers_than_tensors_is_refused_at_once(single_folder, config):
    absurd = tiny_config(balanced=False, encoder={"num_layers": 10**12})
    with pytest.raises(CheckpointError, match="the encoder has 1000000000000 layers by its config"):
        load_into(backbone_of(config), absurd, CheckpointFolder(single_folder))


def test_model_of_another_config_is_refused_by_variable(single_folder, config):
    other = backbone_of(tiny_config(balanced=False, encoder={"num_layers": 2}))
    with pytest.raises(ValueError, match="does not have the variable encoder/layer_2/"):
        load_into(other, config, CheckpointFolder(single_folder))
    other = backbone_of(tiny_config(balanced=False, encoder={"intermediate_dim": 8}))
    with pytest.raises(ValueError, match=r"feed_forward/gate/kernel has shape \(40, 8\)\. Expected \(40, 56\)"):
        load_into(other, config, CheckpointFolder(single_folder))


def test_model_with_lora_is_refused(single_folder, config):
    backbone = backbone_of(config)
    backbone.enable_lora(2)
    with pytest.raises(ValueError, match=r"has LoRA weights .*Load the checkpoint first"):
        load_into(backbone, config, CheckpointFolder(single_folder))


def test_quantized_model_is_refused(single_folder, config):
    backbone = backbone_of(config)
    backbone.decoder.blocks[0].feed_forward.up_dense.quantize("int8")
    with pytest.raises(ValueError, match=r"quantized \(decoder/layer_0/feed_forward/up/.*then `quantize`"):
        load_into(backbone, config, CheckpointFolder(single_folder))


def test_model_with_dropout_is_loaded(single_folder, config):
    backbone = backbone_of(tiny_config(balanced=False, dropout=0.1))
    load_into(backbone, config, CheckpointFolder(single_folder))
    np.testing.assert_array_equal(weight(backbone).T, CheckpointFolder(single_folder).read(NAME))
