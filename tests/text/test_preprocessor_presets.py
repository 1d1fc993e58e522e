"""A preprocessor saved and loaded, from every kind of preset."""

import json

import keras
import keras_hub
import pytest

from keras_t5gemma import hub
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor

OPTIONS = {"encoder_sequence_length": 21, "decoder_sequence_length": 9, "chat": True, "truncate": "left"}
DEFAULTS = {"encoder_sequence_length": 512, "decoder_sequence_length": 512, "chat": False, "truncate": None}


def options_of(preprocessor):
    return {name: getattr(preprocessor, name) for name in OPTIONS}


def test_saved_preprocessor_comes_back_with_every_option(tokenizer, tmp_path):
    T5GemmaSeq2SeqLMPreprocessor(tokenizer, **OPTIONS).save_to_preset(str(tmp_path))
    restored = T5GemmaSeq2SeqLMPreprocessor.from_preset(tmp_path)
    assert options_of(restored) == OPTIONS
    assert restored.tokenizer.proto == tokenizer.proto


def test_saved_preprocessor_takes_other_options_on_loading(tokenizer, tmp_path):
    T5GemmaSeq2SeqLMPreprocessor(tokenizer, **OPTIONS).save_to_preset(str(tmp_path))
    restored = T5GemmaSeq2SeqLMPreprocessor.from_preset(str(tmp_path), encoder_sequence_length=99, chat=False)
    assert options_of(restored) == OPTIONS | {"encoder_sequence_length": 99, "chat": False}


def test_config_round_trips_through_keras_serialization(tokenizer):
    preprocessor = T5GemmaSeq2SeqLMPreprocessor(tokenizer, **OPTIONS)
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(preprocessor))
    restored.tokenizer.set_proto(tokenizer.proto)  # an asset, not part of the config
    text = {"encoder_text": ["Why is the sky blue?"], "decoder_text": ["b"]}
    assert options_of(restored) == OPTIONS
    assert restored(text)[0]["encoder_token_ids"].tolist() == preprocessor(text)[0]["encoder_token_ids"].tolist()


def test_from_preset_of_a_tokenizer_alone_has_the_defaults(tokenizer, tmp_path):
    tokenizer.save_to_preset(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"registered_name": "keras_t5gemma>T5GemmaBackbone"}))
    assert options_of(T5GemmaSeq2SeqLMPreprocessor.from_preset(tmp_path)) == DEFAULTS


def test_from_preset_reads_what_keras_hub_saved(tokenizer, model_file, tmp_path):
    theirs = keras_hub.models.T5GemmaSeq2SeqLMPreprocessor(keras_hub.models.T5GemmaTokenizer(proto=str(model_file)))
    theirs.save_to_preset(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"registered_name": "keras_hub>T5GemmaBackbone"}))
    ours = T5GemmaSeq2SeqLMPreprocessor.from_preset(tmp_path)
    assert options_of(ours) == DEFAULTS
    assert ours.tokenizer.proto == tokenizer.proto


@pytest.mark.parametrize(
    ("files", "chat"),
    [
        ({}, False),
        ({"tokenizer_config.json": {}}, False),
        ({"tokenizer_config.json": {"chat_template": None}}, False),
        ({"tokenizer_config.json": {"chat_template": "{{ bos_token }}"}}, True),
        ({"chat_template.jinja": "{{ bos_token }}"}, True),
    ],
)
def test_from_preset_of_a_hugging_face_folder_speaks_in_turns_where_it_has_a_template(hugging_face_folder, files, chat):
    for name, content in files.items():
        (hugging_face_folder / name).write_text(json.dumps(content))
    assert T5GemmaSeq2SeqLMPreprocessor.from_preset(hugging_face_folder).chat is chat
    assert T5GemmaSeq2SeqLMPreprocessor.from_preset(hugging_face_folder, chat=not chat).chat is not chat


def test_from_preset_of_a_broken_tokenizer_config_is_refused(hugging_face_folder):
    (hugging_face_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
        T5GemmaSeq2SeqLMPreprocessor.from_preset(hugging_face_folder)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("handle", ["name", "hf_handle", "kaggle_handle"])
def test_from_preset_of_a_published_checkpoint_goes_by_its_name(hugging_face_folder, monkeypatch, handle, tuned):
    (hugging_face_folder / "chat_template.jinja").write_text("{{ bos_token }}")
    monkeypatch.setattr(hub, "locate", lambda *_, **__: hugging_face_folder)
    preset = getattr(PRESETS["t5gemma_2b_2b_ul2" + "_it" * tuned], handle)
    assert T5GemmaSeq2SeqLMPreprocessor.from_preset(preset).chat is tuned
