"""The encoder without a decoder: the same numbers from every source, of which it reads its own tensors alone."""

import json

import keras
import keras_hub
import numpy as np
import pytest
import transformers
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.keras_formats.presets import KerasPreset
from keras_t5gemma.checkpoints.tensor_table import parameter_count, tensor_specs
from keras_t5gemma.layers.lora import lora_layers

# Windows longer than the rows: `transformers`' encoder sees one key more on each side.
CONFIG = tiny_config(balanced=False, num_layers=2, sliding_window=32)
BOTH = loud_inputs(CONFIG, batch=2)
INPUTS = {"token_ids": BOTH["encoder_token_ids"], "padding_mask": BOTH["encoder_padding_mask"]}
KEEP = INPUTS["padding_mask"] != 0


def output(encoder):
    return ops.convert_to_numpy(ops.cast(encoder(INPUTS), "float32"))


@pytest.fixture(scope="module")
def backbone():
    return loud_backbone(CONFIG)


@pytest.fixture(scope="module")
def expected(backbone):
    return ops.convert_to_numpy(backbone(BOTH)["encoder_sequence_output"])


@pytest.fixture(scope="module")
def folders(backbone, tmp_path_factory):
    """The same encoder, whole and alone, in both formats."""
    root = tmp_path_factory.mktemp("encoders")
    kt.export_to_hugging_face(backbone, root / "hf")
    backbone.save_to_preset(str(root / "keras"))
    alone = kt.T5GemmaEncoder.from_backbone(backbone)
    kt.export_to_hugging_face(alone, root / "hf_alone")
    alone.save_to_preset(str(root / "keras_alone"))
    return root


@pytest.mark.parametrize("name", ["hf", "keras", "hf_alone", "keras_alone"])
def test_from_preset_reads_only_the_tensors_of_the_encoder(name, folders, expected, monkeypatch):
    read = []
    for source in (CheckpointFolder, KerasPreset):
        for method in ("read", "chunks"):
            original = getattr(source, method)
            monkeypatch.setattr(
                source, method, lambda self, name, o=original: read.append((name, self.nbytes(name))) or o(self, name)
            )
    encoder = kt.T5GemmaEncoder.from_preset(folders / name)
    names = {tensor.name.removeprefix("model.") for tensor in tensor_specs(encoder.config)}
    assert {name.removeprefix("model.") for name, _ in read} == names
    assert sum(dict(read).values()) == 4 * parameter_count(encoder.config) == 4 * encoder.count_params()
    assert encoder.count_params() < 0.6 * parameter_count(CONFIG)
    np.testing.assert_array_equal(output(encoder), expected)


def test_transformers_encoder_reads_the_exported_folder_with_equal_outputs(folders, expected):
    peer, report = transformers.T5GemmaEncoderModel.from_pretrained(
        folders / "hf_alone", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    import torch

    with torch.no_grad():
        found = peer.eval()(
            input_ids=torch.from_numpy(INPUTS["token_ids"]).long(),
            attention_mask=torch.from_numpy(INPUTS["padding_mask"]),
        ).last_hidden_state.numpy()
    assert np.abs(found - expected)[KEEP].max() < 1e-5 * np.abs(expected[KEEP]).max()


def test_folder_that_transformers_wrote_is_read_back(folders, expected, tmp_path):
    transformers.T5GemmaEncoderModel.from_pretrained(folders / "hf_alone").save_pretrained(tmp_path / "theirs")
    np.testing.assert_array_equal(output(kt.T5GemmaEncoder.from_preset(tmp_path / "theirs")), expected)


def test_files_to_files_writes_the_same_encoder(folders, tmp_path):
    kt.convert_checkpoint(folders / "hf", tmp_path / "part", part="encoder")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "part" / file).read_bytes() == (folders / "hf_alone" / file).read_bytes(), file
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert (config["architectures"], config["is_encoder_decoder"]) == (["T5GemmaEncoderModel"], False)
    assert not (tmp_path / "part" / "generation_config.json").exists()
    with pytest.raises(ValueError, match="part"):
        kt.convert_checkpoint(folders / "hf", tmp_path / "other", part="decoder")


@pytest.mark.parametrize("cls", [kt.T5GemmaBackbone, kt.T5GemmaSeq2SeqLM])
@pytest.mark.parametrize("name", ["hf_alone", "keras_alone"])
def test_encoder_loaded_as_a_generator_is_an_error_that_names_the_class(cls, name, folders):
    with pytest.raises(kt.CheckpointError, match=r"loaded by `T5GemmaEncoder\.from_preset`"):
        cls.from_preset(folders / name)


def test_encoder_shares_the_variables_of_its_backbone(backbone):
    encoder = kt.T5GemmaEncoder.from_backbone(backbone)
    assert {id(v) for v in encoder.weights} < {id(v) for v in backbone.weights}
    with pytest.raises(ValueError, match="T5GemmaBackbone"):
        kt.T5GemmaEncoder.from_backbone(encoder)


@pytest.mark.parametrize("state", ["plain", "lora", "int8", "bfloat16", "frozen"])
def test_saved_encoder_comes_back_as_it_was(state, folders, tmp_path):
    dtype = "bfloat16" if state == "bfloat16" else "float32"
    encoder = kt.T5GemmaEncoder.from_preset(folders / "keras", dtype=dtype)
    if state == "lora":
        encoder.enable_lora({"encoder/layer_0/*": 2, "gate": 3})
        for layer in lora_layers(encoder).values():
            layer.lora_kernel_b.assign(ops.full(layer.lora_kernel_b.shape, 0.1))
    elif state == "int8":
        encoder.quantize("int8")
    elif state == "frozen":
        encoder.encoder.blocks[0].trainable = False
    encoder.save_to_preset(str(tmp_path / "preset"))
    encoder.save(tmp_path / "model.keras")
    options = {} if state == "int8" else {"dtype": dtype}
    for again in (
        kt.T5GemmaEncoder.from_preset(tmp_path / "preset", **options),
        keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"), **options),
        keras.models.load_model(tmp_path / "model.keras"),
    ):
        assert type(again) is kt.T5GemmaEncoder
        np.testing.assert_array_equal(output(again), output(encoder))
        assert [v.path for v in again.trainable_weights] == [v.path for v in encoder.trainable_weights]


@pytest.mark.parametrize("state", ["lora", "int8"])
def test_encoder_of_a_changed_backbone_is_changed_too(state, folders, tmp_path):
    backbone = kt.T5GemmaBackbone.from_preset(folders / "keras")
    if state == "lora":
        backbone.enable_lora(2)
        for layer in lora_layers(backbone).values():
            layer.lora_kernel_b.assign(ops.full(layer.lora_kernel_b.shape, 0.1))
    else:
        backbone.quantize("int8")
    backbone.save_to_preset(str(tmp_path / "preset"))
    encoder = kt.T5GemmaEncoder.from_preset(tmp_path / "preset")
    np.testing.assert_array_equal(
        output(encoder), ops.convert_to_numpy(ops.cast(backbone(BOTH)["encoder_sequence_output"], "float32"))
    )
    assert [v.path for v in encoder.trainable_weights] == [
        v.path for v in backbone.trainable_weights if v.path.startswith("encoder/")
    ]
    if state == "lora":
        encoder.merge_lora()
        assert len(encoder.trainable_weights) == len(encoder.weights)


def test_lora_of_an_encoder_goes_through_both_formats(folders, tmp_path):
    encoder = kt.T5GemmaEncoder.from_preset(folders / "hf")
    encoder.enable_lora(2)
    for layer in lora_layers(encoder).values():
        layer.lora_kernel_b.assign(ops.full(layer.lora_kernel_b.shape, 0.1))
    kt.save_lora(encoder, tmp_path / "peft")
    encoder.save_lora_weights(str(tmp_path / "adapter.lora.h5"))
    for read in (
        lambda new: kt.load_lora(new, tmp_path / "peft"),
        lambda new: new.load_lora_weights(str(tmp_path / "adapter.lora.h5")),
    ):
        again = kt.T5GemmaEncoder.from_preset(folders / "hf")
        read(again)
        np.testing.assert_array_equal(output(again), output(encoder))
    with pytest.raises(ValueError, match=r"encoder/\*/self_attention"):
        kt.T5GemmaEncoder.from_preset(folders / "hf").enable_lora(2, "cross_attention")


def test_rematerialized_encoder_and_its_layouts():
    encoder = kt.T5GemmaEncoder(CONFIG.encoder, vocabulary_size=CONFIG.vocabulary_size, encoder_attention="causal")
    encoder.rematerialize = True
    assert encoder.encoder.rematerialize
    changed = {**INPUTS, "token_ids": np.where(np.arange(17) == 16, 3, INPUTS["token_ids"])}
    before, after = output(encoder), ops.convert_to_numpy(encoder(changed))
    np.testing.assert_array_equal(before[0, :16], after[0, :16])  # causal: only the last position sees the last token
    assert np.abs(before[0, 16] - after[0, 16]).max() > 0
    again = kt.T5GemmaEncoder.from_config(encoder.get_config())
    assert again.config == encoder.config
    with pytest.raises(TypeError, match="decoder"):
        kt.T5GemmaEncoder("s", decoder="s")
