"""`keras-t5gemma export --format`: folders of other runtimes, and options that are refused before a model is loaded."""

import os

import keras
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from typer.testing import CliRunner

import keras_t5gemma as kt
from keras_t5gemma.cli import app

FILES = {
    "onnx": {"encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx", "model.onnx_data"},
    "ctranslate2": {"model.bin", "config.json", "shared_vocabulary.json", "tokenizer.json"},
    "saved_model": {"saved_model.pb", "variables"},
}
ON_TORCH = keras.backend.backend() == "torch"


def invoke(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = kt.T5GemmaTokenizer(proto=train_tiny_tokenizer(folder / "tokenizer.model").read_bytes())
    backbone = loud_backbone(tiny_config(vocabulary_size=512, num_layers=1))
    kt.export_to_hugging_face(backbone, folder / "model", tokenizer=tokenizer)
    return folder / "model"


@pytest.mark.filterwarnings("ignore:CTranslate2 computes")
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("onnx", ()),
        ("ctranslate2", ("--quantization", "int8")),
        pytest.param(
            "saved_model",
            ("--input-length", 8, "--max-length", 9, "--no-strings"),
            marks=pytest.mark.skipif(ON_TORCH, reason="PyTorch has no way to TensorFlow"),
        ),
    ],
)
def test_format_writes_its_folder_with_the_options(format, options, checkpoint, tmp_path):
    out = tmp_path / "out"
    result = invoke(checkpoint, out, "--format", format, *options)
    assert result.exit_code == 0, result.output
    assert f"Wrote {out}." in result.output
    assert FILES[format] <= {path.name for path in out.iterdir()}
    if format == "ctranslate2":
        vocabulary = tmp_path / "full"
        assert invoke(checkpoint, vocabulary, "--format", format).exit_code == 0
        sizes = [(folder / "model.bin").stat().st_size for folder in (out, vocabulary)]
        assert sizes[0] < 0.4 * sizes[1]
    if format == "saved_model":
        import tensorflow as tf

        signatures = tf.saved_model.load(str(out)).signatures
        assert sorted(signatures) == ["embed", "generate", "score", "serving_default"]
        assert signatures["generate"].structured_outputs["decoder_token_ids"].shape[1] == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--format", "onnx", "--dtype", "bfloat16"), "--dtype has no effect with --format onnx"),
        (("--format", "onnx", "--part", "encoder"), "kt.T5GemmaEncoder.from_preset"),
        (("--format", "ctranslate2", "--dtype", "float16"), "Use --quantization"),
        (("--format", "ctranslate2", "--quantization", "int7"), "int7"),
        (("--format", "saved_model", "--max-shard-size", "1GB"), "--max-shard-size has no effect"),
        (("--format", "saved_model", "--backend", "torch"), "Pass --backend tensorflow"),
        (("--quantization", "int8"), "It is for --format ctranslate2"),
        (("--format", "keras", "--input-length", "8"), "It is for --format saved_model"),
        (("--format", "onnx", "--no-strings"), "--no-strings has no effect"),
        (("--format", "onnx", "--allow-non-finite"), "--allow-non-finite has no effect"),
    ],
)
def test_option_that_a_format_does_not_read_is_refused_before_the_model_is_looked_for(arguments, words, tmp_path):
    result = invoke("no_such_model", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
    assert "no_such_model" not in result.output
    assert not os.listdir(tmp_path)


def test_unknown_model_is_an_error_after_the_options(tmp_path):
    result = invoke("no_such_model", tmp_path / "out", "--format", "onnx")
    assert result.exit_code == 1
    assert "no_such_model" in result.output
