"""Gemma's vocabulary as a keras-hub tokenizer."""

import json
import warnings

import keras
import keras_hub
import numpy as np
import pytest
import sentencepiece

import keras_t5gemma as kt
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

TEXT = "  Why is\n\nthe sky blue?\t漢 <start_of_turn>12<unused3>"


def test_special_ids_are_gemmas(tokenizer):
    names = ("pad", "end", "start", "unk", "start_of_turn", "end_token2")
    attributes = [f"{name}_token_id" if name != "end_token2" else "end_token2_id" for name in names]
    assert [getattr(tokenizer, name) for name in attributes] == [0, 1, 2, 3, 106, 107]
    assert sorted(tokenizer.special_token_ids) == [0, 1, 2, 3, 106, 107]


def test_ids_equal_sentencepiece_and_read_back(tokenizer, model_file):
    expected = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).encode(TEXT)
    assert np.array(tokenizer(TEXT)).tolist() == expected
    assert tokenizer.detokenize(tokenizer(TEXT)) == TEXT
    assert tokenizer.detokenize(tokenizer([TEXT, "a"])) == [TEXT, "a"]


def test_ids_equal_those_transformers_reads_off_the_same_file(tokenizer, model_file):
    import transformers

    peer = transformers.GemmaTokenizer.from_pretrained(model_file.parent)
    assert peer(TEXT, add_special_tokens=False)["input_ids"] == np.array(tokenizer(TEXT)).tolist()


def test_ids_in_a_traced_pipeline_equal_those_outside(tokenizer):
    import tensorflow as tf

    tf.random.set_seed(0)  # empties the cache in which TensorFlow's own tokenizer would have its vocabulary
    (ids,) = tf.data.Dataset.from_tensors(TEXT).map(tokenizer).as_numpy_iterator()
    assert ids.tolist() == np.array(tokenizer(TEXT)).tolist()
    (rows,) = tf.data.Dataset.from_tensors([TEXT, "", "the sky"]).map(tokenizer)
    assert rows.to_list() == [np.array(tokenizer(text)).tolist() for text in (TEXT, "", "the sky")]


@pytest.mark.parametrize("read", [str, lambda path: path, lambda path: path.read_bytes()])
def test_proto_is_a_path_or_bytes(tokenizer, model_file, read):
    assert T5GemmaTokenizer(proto=read(model_file)).get_vocabulary() == tokenizer.get_vocabulary()


@pytest.mark.parametrize("proto", [b"", b"no model", "no/such/file", 3])
def test_proto_that_is_no_model_is_refused(proto):
    with pytest.raises(ValueError, match="`proto`"):
        T5GemmaTokenizer(proto=proto)


def test_proto_without_gemmas_special_tokens_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"]), model_prefix=str(tmp_path / "other"), vocab_size=7, minloglevel=2
    )
    with pytest.raises(ValueError, match="Cannot find special token"):
        T5GemmaTokenizer(proto=tmp_path / "other.model")


def test_saved_tokenizer_comes_back_whole(tokenizer, tmp_path):
    tokenizer.save_to_preset(str(tmp_path))
    restored = T5GemmaTokenizer.from_preset(tmp_path)
    assert restored.proto == tokenizer.proto
    assert restored.get_config() == tokenizer.get_config()


def test_config_round_trips_through_keras_serialization(tokenizer):
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(tokenizer))
    assert type(restored) is T5GemmaTokenizer
    assert restored.proto is None  # the vocabulary is an asset of its own


def test_from_preset_reads_a_hugging_face_folder(tokenizer, hugging_face_folder):
    assert T5GemmaTokenizer.from_preset(hugging_face_folder).proto == tokenizer.proto
    assert T5GemmaTokenizer.from_preset(str(hugging_face_folder), add_bos=True).add_bos


@pytest.mark.parametrize("class_name", ["T5GemmaTokenizer", "GemmaTokenizer"])
def test_from_preset_reads_what_keras_hub_saved(tokenizer, model_file, tmp_path, class_name):
    theirs = getattr(keras_hub.tokenizers, class_name)(proto=str(model_file))
    theirs.save_to_preset(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"registered_name": "keras_hub>T5GemmaBackbone"}))
    ours = T5GemmaTokenizer.from_preset(tmp_path)
    assert type(ours) is T5GemmaTokenizer
    assert ours.proto == tokenizer.proto


def test_from_preset_takes_keras_hubs_gemma_names(tokenizer, model_file, monkeypatch):
    asked = []

    def stand_in(handle, path):
        asked.append((handle.rpartition("/")[0], path))
        return str(model_file)

    monkeypatch.setattr("kagglehub.model_download", stand_in)
    assert T5GemmaTokenizer.from_preset("gemma2_2b_en").proto == tokenizer.proto
    # The vocabulary alone: the weights stay where they are.
    assert asked == [("keras/gemma2/keras/gemma2_2b_en", "assets/tokenizer/vocabulary.spm")]


def test_from_preset_without_tokenizer_model_says_what_it_looked_for(hugging_face_folder):
    (hugging_face_folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"`tokenizer.model` in .*Found: config.json"):
        T5GemmaTokenizer.from_preset(hugging_face_folder)


def test_from_preset_of_a_keras_folder_without_tokenizer_says_what_it_looked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"registered_name": "keras_t5gemma>T5GemmaBackbone"}))
    with pytest.raises(ValueError, match=r"`tokenizer.json` in .*Found: config.json"):
        T5GemmaTokenizer.from_preset(tmp_path)


def test_from_preset_of_a_keras_folder_without_vocabulary_says_what_it_looked_for(tokenizer, tmp_path):
    tokenizer.save_to_preset(str(tmp_path))
    (tmp_path / "assets" / "tokenizer" / "vocabulary.spm").unlink()
    with pytest.raises(ValueError, match=r"`assets/tokenizer/vocabulary.spm` in "):
        T5GemmaTokenizer.from_preset(tmp_path)


def test_from_preset_of_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="Unknown preset 't5gemma_3b_3b_ul2'"):
        T5GemmaTokenizer.from_preset("t5gemma_3b_3b_ul2")


def test_half_of_a_surrogate_pair_is_refused_and_shown(tokenizer):
    for texts in ("a\ud83d", ["whole \U0001f600", "a\ud83d"]):
        with pytest.raises(ValueError, match=r"Text [01] holds half of a surrogate pair.*'a\\ud83d'.*replace"):
            tokenizer(texts)
    assert list(tokenizer("a\ud83d".encode("utf-8", "replace").decode())) == list(tokenizer("a?"))


def test_detokenize_takes_any_integers(tokenizer):
    ids = [int(i) for i in tokenizer("the sky")]
    for form in (ids, tuple(ids), [np.int32(i) for i in ids], [np.int64(i) for i in ids], np.array(ids)):
        assert tokenizer.detokenize(form) == "the sky"
    assert tokenizer.detokenize([[np.int64(i) for i in ids], ids[:0]]) == ["the sky", ""]
    assert tokenizer.detokenize(np.int64(107)) == tokenizer.detokenize(107)


def of_pairs(tokenizer, texts):
    pairs = [(text, text) for text in texts]
    return list(
        kt.supervised_dataset(pairs, tokenizer, batch_size=1, encoder_length=64, decoder_length=64, num_epochs=1)
    )


TEXTS_IN = {
    "tokenizer": lambda tokenizer, texts: tokenizer(texts),
    "fit": lambda tokenizer, texts: preprocessor(tokenizer)({"encoder_text": texts, "decoder_text": texts}),
    "generate": lambda tokenizer, texts: preprocessor(tokenizer).generate_preprocess(texts),
    "pretraining": lambda tokenizer, texts: kt.pretraining_dataset(texts, tokenizer, kt.PrefixLM(4, 4), batch_size=1),
    "pairs": of_pairs,
}


def preprocessor(tokenizer):
    return kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 64, 64)


@pytest.mark.parametrize("way", TEXTS_IN.values(), ids=TEXTS_IN)
@pytest.mark.parametrize("token", ["<bos>", "<eos>", "<pad>"])
def test_text_with_a_token_that_is_added_is_one_warning_that_shows_it(model_file, way, token):
    texts_with_it = [f"the fox{token}", f"{token} is here"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        way(T5GemmaTokenizer(proto=model_file), ["the lazy dog", *texts_with_it, "a <b> of html"])
    (warning,) = (warning for warning in caught if warning.category is UserWarning)
    assert repr(token) in str(warning.message)
    assert warning.filename == __file__
    # Datasets read in several threads: which text comes first is left open.
    assert any(repr(text) in str(warning.message) for text in texts_with_it)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        way(T5GemmaTokenizer(proto=model_file), ["the lazy dog", "a <b> of html", "<unused3> and <0x0A>"])
