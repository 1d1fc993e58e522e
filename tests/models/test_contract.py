"""The whole Keras contract, in one harness: train, evaluate, predict, save, load, LoRA, quantize, mixed precision."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

CONFIG = tiny_config(balanced=False, num_layers=2, vocabulary_size=512)
TEXTS = {"encoder_text": ["why is the sky blue?", "who?"], "decoder_text": ["it scatters light", "me"]}


def new_lm(**kwargs):
    return T5GemmaSeq2SeqLM(loud_backbone(CONFIG, **kwargs))


def batch():
    inputs = loud_inputs(CONFIG)
    return inputs, inputs["decoder_token_ids"], inputs["decoder_padding_mask"].astype("float32")


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tiny_tokenizer(path)
    return T5GemmaSeq2SeqLMPreprocessor(
        T5GemmaTokenizer(str(path)), encoder_sequence_length=32, decoder_sequence_length=24
    )


def test_fit_lowers_the_loss_that_evaluate_reports_and_predict_gives_logits():
    lm, (x, y, weights) = new_lm(), batch()
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    before = lm.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)["loss"]
    lm.fit(x, y, sample_weight=weights, epochs=3, verbose=0)
    assert lm.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)["loss"] < before
    logits = lm.predict(x, verbose=0)
    assert logits.shape == (*y.shape, CONFIG.vocabulary_size)
    assert np.isfinite(logits).all()


@pytest.mark.skipif(keras.config.backend() != "torch", reason="elsewhere gradients are no part of a weight")
@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_do_not_outlast_the_step(steps):
    lm, (x, y, weights) = new_lm(), batch()
    lm.compile(optimizer="sgd", accumulation_steps=steps)
    before = lm.evaluate(x, y, sample_weight=weights, verbose=0)
    lm.train_on_batch(x, y, sample_weight=weights)
    assert all(variable.value.grad is None for variable in lm.trainable_variables)
    assert lm.evaluate(x, y, sample_weight=weights, verbose=0) != before


def test_fit_on_arrays_shuffles_them_each_epoch_unless_told_otherwise():
    seen = []

    class Spy(T5GemmaSeq2SeqLM):
        def _to_arrays(self, **options):
            to_arrays = super()._to_arrays(**options)

            def watched(x, *rest):
                seen.append([int(row[0]) for row in x["encoder_token_ids"]])
                return to_arrays(x, *rest)

            return watched

    lm = Spy(loud_backbone(CONFIG))
    x = {
        "encoder_token_ids": np.tile(np.arange(3, 35, dtype="int32")[:, None], (1, 4)),
        "encoder_padding_mask": np.ones((32, 4), "int32"),
        "decoder_token_ids": np.full((32, 3), 5, "int32"),
        "decoder_padding_mask": np.ones((32, 3), "int32"),
    }
    orders = {}
    for shuffle in (True, False):
        seen.clear()
        lm.fit(x, x["decoder_token_ids"], batch_size=32, epochs=2, shuffle=shuffle, verbose=0)
        orders[shuffle] = {tuple(order) for order in seen}
    assert orders[False] == {tuple(range(3, 35))}
    assert len(orders[True]) == 2
    assert all(sorted(order) == list(range(3, 35)) for order in orders[True])


def test_fit_splits_off_the_last_rows_for_validation(preprocessor):
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG), preprocessor)
    rows = {name: texts * 4 for name, texts in TEXTS.items()}
    history = lm.fit(rows, batch_size=2, validation_split=0.25, verbose=0).history
    expected = lm.evaluate({name: texts[-2:] for name, texts in rows.items()}, verbose=0, return_dict=True)["loss"]
    assert history["val_loss"] == [pytest.approx(expected, rel=1e-4)]
    with pytest.raises(ValueError, match="validation_split"):
        lm.fit(TEXTS, validation_split=0.99, verbose=0)


def test_fit_names_columns_of_unequal_length(preprocessor):
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG), preprocessor)
    with pytest.raises(ValueError, match="'decoder_text': 1"):
        lm.fit({"encoder_text": ["a", "b"], "decoder_text": ["c"]}, verbose=0)


def test_fit_takes_conversations_of_unequal_length(preprocessor):
    chats = [
        [{"role": "user", "content": "hi"}],
        [
            {"role": "user", "content": "hi"},
            {"role": "model", "content": "yo"},
            {"role": "user", "content": "why?"},
        ],
    ]
    chatting = T5GemmaSeq2SeqLMPreprocessor(
        preprocessor.tokenizer, encoder_sequence_length=96, decoder_sequence_length=24, chat=True
    )
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG), chatting)
    history = lm.fit({"encoder_text": chats, "decoder_text": ["yes", "no"]}, batch_size=2, verbose=0).history
    assert np.isfinite(history["loss"][0])


def test_fit_takes_a_pretraining_dataset_with_a_preprocessor_attached(preprocessor):
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG), preprocessor)
    data = pretraining_dataset(["the sky is blue " * 40], preprocessor.tokenizer, PrefixLM(16, 16), batch_size=2)
    history = lm.fit(data, steps_per_epoch=2, verbose=0).history
    assert np.isfinite(history["loss"][0])


def test_fit_without_compile_says_so():
    lm, (x, y, weights) = T5GemmaSeq2SeqLM(loud_backbone(CONFIG), compile=False), batch()
    with pytest.raises(ValueError, match="compile"):
        lm.fit(x, y, sample_weight=weights, verbose=0)


def test_fit_with_ids_outside_the_vocabulary_names_the_input():
    lm, (x, y, weights) = new_lm(), batch()
    x["decoder_token_ids"][0, 0] = CONFIG.vocabulary_size
    with pytest.raises(ValueError, match="decoder_token_ids"):
        lm.fit(x, y, sample_weight=weights, verbose=0)


def test_saved_model_loads_with_the_same_logits_and_compile_state(tmp_path):
    lm, (x, _, _) = new_lm(), batch()
    lm.compile(optimizer=keras.optimizers.SGD(0.125), sampler="beam")
    path = tmp_path / "model.keras"
    lm.save(path)
    loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(loaded.predict_on_batch(x), lm.predict_on_batch(x))
    assert float(loaded.optimizer.learning_rate) == 0.125
    assert loaded.sampler.get_config() == lm.sampler.get_config()


def test_saved_model_with_preprocessor_generates_the_same_text(tmp_path, preprocessor):
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG), preprocessor)
    path = tmp_path / "model.keras"
    lm.save(path)
    prompts = TEXTS["encoder_text"]
    assert keras.models.load_model(path).generate(prompts) == lm.generate(prompts)


def test_preset_folder_gives_the_same_model_and_text(tmp_path, preprocessor):
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG), preprocessor)
    lm.save_to_preset(str(tmp_path / "preset"))
    loaded = T5GemmaSeq2SeqLM.from_preset(str(tmp_path / "preset"))
    for ours, theirs in zip(lm.backbone.weights, loaded.backbone.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(ours.value), ops.convert_to_numpy(theirs.value))
    assert loaded.backbone.get_config() == lm.backbone.get_config()
    assert loaded.generate("why?", max_length=12) == lm.generate("why?", max_length=12)


def test_preset_folder_is_found_by_keras_hub_in_a_new_process(tmp_path, preprocessor):
    T5GemmaSeq2SeqLM(loud_backbone(CONFIG), preprocessor).save_to_preset(str(tmp_path / "preset"))
    code = (
        "import keras_hub, keras_t5gemma.models.seq2seq_lm as m;"
        f"lm = keras_hub.models.Seq2SeqLM.from_preset({str(tmp_path / 'preset')!r});"
        "assert type(lm) is m.T5GemmaSeq2SeqLM, type(lm)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fit_and_generate_take_texts(preprocessor):
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG), preprocessor)
    lm.fit(TEXTS, batch_size=2, verbose=0)
    texts = lm.generate(TEXTS["encoder_text"], max_length=10)
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)
    assert isinstance(lm.generate("why?", max_length=10), str)
    started = {"encoder_text": "why?", "decoder_text": "it"}
    whole = lm.generate(started, max_length=10, stop_token_ids=None)
    assert whole.startswith("it")
    assert lm.generate(started, max_length=10, stop_token_ids=None, strip_prompt=True) == whole.removeprefix("it")


def test_lora_trains_its_factors_only():
    lm, (x, y, weights) = new_lm(), batch()
    lm.backbone.enable_lora(2)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    before = {v.path: ops.convert_to_numpy(v.value).copy() for v in lm.weights}
    lm.fit(x, y, sample_weight=weights, epochs=2, verbose=0)
    moved = {v.path for v in lm.weights if (ops.convert_to_numpy(v.value) != before[v.path]).any()}
    assert moved
    assert all("lora" in path for path in moved)


def test_int8_stays_near_and_generates():
    lm, (x, _, _) = new_lm(), batch()
    before = lm.predict_on_batch(x)
    lm.quantize("int8")
    assert any(str(v.dtype) == "int8" for v in lm.backbone.weights)
    after = lm.predict_on_batch(x)
    keep = x["decoder_padding_mask"].astype(bool)
    assert np.abs(after - before)[keep].mean() < 0.1 * np.abs(before[keep]).mean()
    encoder = {name: values for name, values in x.items() if name.startswith("encoder")}
    assert lm.generate(encoder, max_length=6, stop_token_ids=None)["decoder_token_ids"].shape == (3, 6)


def test_mixed_bfloat16_keeps_float32_weights_and_trains():
    lm, (x, y, weights) = new_lm(dtype="mixed_bfloat16"), batch()
    assert {str(v.dtype) for v in lm.backbone.weights} == {"float32"}
    lm.fit(x, y, sample_weight=weights, verbose=0)
    assert np.isfinite(lm.evaluate(x, y, sample_weight=weights, verbose=0)[0])


def test_summary_counts_every_weight(capsys):
    backbone = T5GemmaBackbone(**CONFIG.to_dict())
    backbone.summary(print_fn=print)
    assert f"{backbone.count_params():,}" in capsys.readouterr().out
