"""Every origin of weights gives the same config and tensors as every other, or a clear refusal."""

import dataclasses
import json

import keras_hub
import numpy as np
import pytest
from helpers.peers import keras_t5gemma, loud_inputs, tiny_config, tiny_gemma_stack
from helpers.tiny import backbone_of
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.adapt import AdaptedTensors
from keras_t5gemma.checkpoints.load import load_into
from keras_t5gemma.checkpoints.sources import gemma2_source, t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CheckpointError

STACK = tiny_gemma_stack()


def test_gemma2_folder_has_the_tensors_of_the_model(gemma2_folder, gemma2_peer):
    source = gemma2_source(gemma2_folder)
    assert (source.config.stack, source.config.vocabulary_size) == (STACK, 128)
    for name, parameter in gemma2_peer.named_parameters():
        np.testing.assert_array_equal(source.tensors.read(name), parameter.detach().numpy())


def test_keras_gemma_preset_folder_gives_what_the_model_in_memory_gives(tmp_path, keras_gemma):
    keras_gemma.save_to_preset(tmp_path / "preset")
    saved, live = gemma2_source(tmp_path / "preset"), gemma2_source(keras_gemma)
    assert saved.config == live.config
    assert live.config.stack == STACK
    for name in live.tensors.names():
        np.testing.assert_array_equal(saved.tensors.read(name), live.tensors.read(name))


def test_keras_causal_lm_is_taken_by_its_backbone(keras_gemma):
    language_model = keras_hub.models.GemmaCausalLM(keras_gemma, preprocessor=None)
    assert gemma2_source(language_model).config == gemma2_source(keras_gemma).config


def test_causal_encoder_adapted_from_keras_gemma_has_its_hidden_states(keras_gemma):
    source = gemma2_source(keras_gemma)
    adapted = AdaptedTensors(source, source, encoder_attention="causal")
    backbone = backbone_of(adapted.config)
    load_into(backbone, adapted.config, adapted)
    inputs = loud_inputs(adapted.config)
    got = backbone.predict(inputs, verbose=0)["encoder_sequence_output"]
    expected = keras_gemma.predict(
        {"token_ids": inputs["encoder_token_ids"], "padding_mask": inputs["encoder_padding_mask"]}, verbose=0
    )
    keep = inputs["encoder_padding_mask"].astype(bool)
    np.testing.assert_allclose(got[keep], expected[keep], atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"sliding_window_size": 3}, "sliding_window", 3),
        ({"use_sliding_window_attention": False}, "layer_pattern", ("global",)),
        ({"attention_logit_soft_cap": None}, "attention_soft_cap", None),
        ({"query_head_dim_normalize": False}, "query_scalar", 8),
        ({"dropout": 0.3}, "dropout", 0.3),
        ({"intermediate_dim": 20}, "intermediate_dim", 10),
    ],
)
def test_keras_gemma_setting_is_read(keras_gemma, changes, field, value):
    config = {**keras_gemma.get_config(), "num_layers": 1, **changes}
    stack = gemma2_source(keras_hub.models.GemmaBackbone.from_config(config)).config.stack
    assert getattr(stack, field) == value
    assert getattr(stack, field) != getattr(STACK, field)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_post_ffw_norm": False}, "`use_post_ffw_norm` is False, as in Gemma 1"),
        ({"use_post_attention_norm": False}, "`use_post_attention_norm` is False, as in Gemma 1"),
        ({"layer_norm_epsilon": 1e-3}, r"`layer_norm_epsilon` is 0\.001"),
    ],
)
def test_keras_gemma_that_is_no_gemma2_is_refused(keras_gemma, changes, message):
    config = {**keras_gemma.get_config(), "num_layers": 1, **changes}
    with pytest.raises(CheckpointError, match=message):
        gemma2_source(keras_hub.models.GemmaBackbone.from_config(config))


def test_keras_gemma_with_lora_is_refused(keras_gemma):
    backbone = keras_hub.models.GemmaBackbone.from_config({**keras_gemma.get_config(), "num_layers": 1})
    backbone.enable_lora(2)
    with pytest.raises(CheckpointError, match="lora_kernel_a is superfluous"):
        gemma2_source(backbone)


@pytest.mark.parametrize("model", [3, None, "backbone"], ids=str)
def test_object_that_is_no_gemma_is_refused_by_its_class(model):
    model = backbone_of(tiny_config(num_layers=1)) if model == "backbone" else model
    with pytest.raises(CheckpointError, match=rf"keras_hub\.models\.GemmaBackbone\. Received: {type(model).__name__}"):
        gemma2_source(model)


@pytest.mark.parametrize("edit", [{"model_type": "gemma"}, {"num_hidden_layers": 2, "layer_types": None}])
def test_gemma2_folder_that_does_not_fit_its_config_is_refused(damaged, gemma2_folder, edit):
    path = damaged(gemma2_folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(CheckpointError, match=r"`model_type` is 'gemma'|this Gemma 2 does not have.*layers\.2"):
        gemma2_source(path.parent)


def test_t5gemma_folder_is_no_gemma2_and_the_reverse(single_folder, gemma2_folder):
    with pytest.raises(CheckpointError, match=r"`model_type` is 't5gemma'\. Expected 'gemma2'"):
        gemma2_source(single_folder)
    with pytest.raises(CheckpointError, match=r"`model_type` is 'gemma2'\. Expected 't5gemma'\. .*adapt_gemma2"):
        t5gemma_source(gemma2_folder)


def test_t5gemma_folder_has_config_and_tensors(sharded_folder, config, peer):
    source = t5gemma_source(str(sharded_folder))
    assert source.config == config
    assert set(source.tensors.names()) == {name for name, _ in peer.named_parameters()}


def test_t5gemma_folder_that_lacks_a_tensor_is_refused_when_opened(damaged, single_folder):
    path = damaged(single_folder) / "config.json"
    values = json.loads(path.read_text())
    values["tie_word_embeddings"] = False
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"missing, among them 'lm_head\.out_proj\.weight'"):
        t5gemma_source(path.parent)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_keras_t5gemma_computes_the_same_after_loading(tied):
    # Without sliding layers and within no window: keras-hub's own windows are off.
    config = tiny_config(
        decoder={"head_dim": 10, "intermediate_dim": 20},
        num_layers=1,
        layer_pattern=("global",),
        sliding_window=7,
        tie_embeddings=tied,
    )
    theirs = keras_t5gemma(config)
    source = t5gemma_source(theirs)
    assert source.config == config
    backbone = backbone_of(config)
    load_into(backbone, config, source.tensors)
    inputs = loud_inputs(config)
    expected, got = theirs.predict(inputs, verbose=0), backbone.predict(inputs, verbose=0)
    for name, mask in (("encoder", "encoder_padding_mask"), ("decoder", "decoder_padding_mask")):
        keep = inputs[mask].astype(bool)
        np.testing.assert_allclose(
            got[f"{name}_sequence_output"][keep], expected[f"{name}_sequence_output"][keep], atol=1e-4
        )
    if not tied:
        hidden = ops.convert_to_tensor(expected["decoder_sequence_output"])
        np.testing.assert_allclose(
            ops.convert_to_numpy(backbone.decoder.token_embedding(hidden, reverse=True)),
            ops.convert_to_numpy(theirs.decoder_token_embedding(hidden, reverse=True)),
            atol=1e-4,
        )


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 3}, {"rope_wavelength": 99.0}, {"norm_epsilon": 1e-4}, {"attention_soft_cap": None}],
    ids=str,
)
def test_keras_t5gemma_setting_is_read(changes):
    config = tiny_config(num_layers=2, **changes)
    assert t5gemma_source(keras_t5gemma(config)).config == config


def test_keras_t5gemma_preset_folder_gives_what_the_model_in_memory_gives(tmp_path):
    config = tiny_config(num_layers=2)
    backbone = keras_t5gemma(config)
    backbone.save_to_preset(tmp_path / "preset")
    saved, live = t5gemma_source(tmp_path / "preset"), t5gemma_source(backbone)
    assert saved.config == live.config == config
    for name in live.tensors.names():
        np.testing.assert_array_equal(saved.tensors.read(name), live.tensors.read(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "`attention_bias` is True. Expected False"),
        ({"hidden_activation": "relu"}, "`hidden_activation` is 'relu'. Expected 'gelu_approximate'"),
    ],
)
def test_keras_t5gemma_that_we_do_not_compute_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        t5gemma_source(keras_t5gemma(tiny_config(num_layers=1), **changes))


def test_keras_preset_of_another_model_is_refused_by_name(tmp_path, keras_gemma):
    keras_gemma.save_to_preset(tmp_path / "gemma")
    with pytest.raises(
        CheckpointError, match=r"Keras preset of keras_hub>GemmaBackbone\. Expected keras_hub>T5Gemma.*adapt_g"
    ):
        t5gemma_source(tmp_path / "gemma")


@pytest.mark.parametrize(
    "load",
    [
        kt.T5GemmaSeq2SeqLM.from_preset,
        kt.T5GemmaBackbone.from_preset,
        kt.T5GemmaTextEmbedder.from_preset,
        lambda preset: kt.T5GemmaTextClassifier.from_preset(preset, num_classes=2),
        kt.T5GemmaTokenClassifier.from_preset,
    ],
)
def test_gemma2_in_place_of_a_t5gemma_is_an_error_that_names_what_makes_one_of_it(load, gemma2_folder):
    for preset in ("gemma2_2b_en", gemma2_folder):
        with pytest.raises(ValueError, match=r"`keras_t5gemma\.adapt_gemma2` makes a T5Gemma of a Gemma 2"):
            load(preset)


@pytest.mark.parametrize("find", [gemma2_source, t5gemma_source])
def test_unknown_name_says_what_would_work(find):
    with pytest.raises(ValueError, match="Unknown preset 'gemma2_7b'"):
        find("gemma2_7b")


def test_keras_hub_name_is_looked_for_on_kaggle(monkeypatch):
    def unreachable(handle):
        raise OSError(f"Failed to resolve 'api.kaggle.com' for {handle}")

    monkeypatch.setattr("kagglehub.model_download", unreachable)
    with pytest.raises(ConnectionError, match=r"keras/gemma2/keras/gemma2_2b_en/.*api\.kaggle\.com.*KAGGLE_USERNAME"):
        gemma2_source("gemma2_2b_en")


def test_sources_are_equal_however_the_stack_was_written(gemma2_folder, keras_gemma):
    assert dataclasses.asdict(gemma2_source(gemma2_folder).config) == dataclasses.asdict(
        gemma2_source(keras_gemma).config
    )
