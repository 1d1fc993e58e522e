"""Calls that are slightly wrong: each is one error that says what would work, before anything is changed."""

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer

import keras_t5gemma as kt


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong_calls")
    tokenizer = kt.T5GemmaTokenizer(proto=train_tiny_tokenizer(folder / "tokenizer.model"))
    backbone = loud_backbone(tiny_config(num_layers=1), vocabulary_size=512)
    lm = kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 8, 8))
    lm.save_to_preset(str(folder / "preset"))
    return str(folder / "preset")


@pytest.fixture(scope="module")
def lm(preset):
    return kt.T5GemmaSeq2SeqLM.from_preset(preset)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"encoder_sequence_length": 16},
            r"preprocessor=T5GemmaSeq2SeqLMPreprocessor\(\.\.\., encoder_sequence_length",
        ),
        ({"dtyp": "bfloat16"}, "unexpected keyword argument 'dtyp'.*dtype"),
    ],
)
def test_keyword_of_from_preset_that_nothing_takes_is_refused(kwargs, message, preset):
    with pytest.raises(TypeError, match=message):
        kt.T5GemmaSeq2SeqLM.from_preset(preset, **kwargs)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        kt.T5GemmaBackbone.from_preset(preset, **kwargs)


@pytest.mark.parametrize("mode", ["float8", "int3", "INT8", "gptq", None, 8, "int4/0"])
def test_mode_that_is_no_mode_of_ours_is_refused_with_those_that_are(mode, lm):
    with pytest.raises(ValueError, match='"int8", "int4", or "int4/32"'):
        lm.quantize(mode)
    assert not any(layer.quantization_mode for layer in lm._flatten_layers())


def test_dtype_that_says_half_is_refused_with_the_whole(preset):
    with pytest.raises(ValueError, match='Use "int8_from_bfloat16"'):
        kt.T5GemmaSeq2SeqLM.from_preset(preset, dtype="int8")


def test_mode_with_a_size_of_blocks_is_that_of_the_config(preset):
    ids = {"encoder_token_ids": [[5, 6, 7]], "decoder_token_ids": [[2, 8, 9]]}
    found = []
    for arguments in (
        {"mode": "int4/8"},
        {"config": keras.quantizers.Int4QuantizationConfig(block_size=8)},
        {"mode": "int4"},
    ):
        quantized = kt.T5GemmaSeq2SeqLM.from_preset(preset)
        quantized.quantize(**arguments)
        found.append(quantized.predict(ids, verbose=0))
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_file_in_place_of_a_folder_says_who_reads_it(lm, tmp_path):
    lm.save(tmp_path / "lm.keras")
    with pytest.raises(ValueError, match=r"keras\.models\.load_model"):
        kt.T5GemmaSeq2SeqLM.from_preset(str(tmp_path / "lm.keras"))
    with pytest.raises(TypeError, match="`model` comes before `folder`"):
        kt.export_to_hugging_face(str(tmp_path / "out"), lm)


@pytest.mark.parametrize("rate", ["1e-4", True, float("nan"), keras.optimizers.schedules.CosineDecay(1e-3, 10)])
def test_learning_rate_that_is_no_number_is_refused(rate):
    with pytest.raises(ValueError, match=r"`learning_rate` must be positive.*learning_rate = schedule"):
        kt.optimizer(learning_rate=rate)


def test_schedule_of_ones_own_is_followed_once_it_is_set(lm):
    made = kt.optimizer(warmup_steps=0)
    made.learning_rate = keras.optimizers.schedules.PiecewiseConstantDecay([3], [0.5, 0.25])
    made.build([keras.Variable(np.ones((2, 2)))])
    assert float(made.learning_rate) == 0.5
    made.iterations.assign(4)
    assert float(made.learning_rate) == 0.25


def test_data_of_a_checkpoint_need_its_callback(lm, tmp_path):
    rows = {"encoder_text": ["one"], "decoder_text": ["two"]}
    checkpoint = kt.TrainingCheckpoint(tmp_path / "run", save_every=1)
    data = checkpoint.data(rows, batch_size=1)
    with pytest.raises(ValueError, match="`callbacks` must have the TrainingCheckpoint"):
        lm.fit(data, verbose=0)
    with pytest.raises(ValueError, match="`callbacks` must have the TrainingCheckpoint"):
        lm.fit(data, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()])
    stopping = keras.callbacks.EarlyStopping("loss")
    with pytest.raises(ValueError, match=r"Received: \['TrainingCheckpoint', 'EarlyStopping'\]"):
        lm.fit(data, verbose=0, callbacks=[checkpoint, stopping])
