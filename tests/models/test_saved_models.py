"""The table of what can be saved, and how: each cell comes back bit for bit and trains the same, or says what to call.

{float32, bfloat16, int8, int4, int4 in blocks} x {plain, LoRA, LoRA trained} x {`save_to_preset`, `.keras`,
`save_weights`, `export_to_hugging_face`, `save_lora`}, here and from another backend's files.
"""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import saved_models
from helpers.launch import python_path
from helpers.saved_models import DTYPES, LORA, QUANTIZATIONS, WRITE, logits, new_model, read, trainable, weights
from keras import ops

import keras_t5gemma as kt

# Each backend reads the files of the next.
WRITERS = {"jax": "tensorflow", "tensorflow": "torch", "torch": "jax"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_models.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(base):
    """Models by cell, made once, with their logits. Trained LoRA is trained by `fit`."""
    models = {}

    def get(dtype, lora):
        if (dtype, lora) not in models:
            lm = new_model(base, dtype, "plain" if lora == "plain" else "lora")
            if lora == "trained lora":
                x = saved_models.INPUTS
                frozen = weights(lm)
                lm.compile(optimizer=keras.optimizers.SGD(0.5), run_eagerly=True)
                lm.fit(x, x["decoder_token_ids"], sample_weight=x["decoder_padding_mask"], verbose=0)
                changed = {path for path, array in weights(lm).items() if (array != frozen[path]).any()}
                assert changed == {path for path in trainable(lm) if path.endswith("lora_kernel_b")}
            models[dtype, lora] = lm, logits(lm)
        return models[dtype, lora]

    return get


@pytest.mark.parametrize("way", WRITE)
@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cell_of_the_table(dtype, lora, way, base, made, tmp_path):
    lm, expected = made(dtype, lora)
    if way == "save_lora" and lora == "plain":
        with pytest.raises(ValueError, match="enable_lora"):
            WRITE[way](lm, tmp_path / "saved")
        return
    if way == "export_to_hugging_face" and dtype in QUANTIZATIONS:
        with pytest.raises(ValueError, match="save_to_preset"):
            WRITE[way](lm, tmp_path / "saved")
        return
    WRITE[way](lm, tmp_path / "saved")
    found = read(way, tmp_path / "saved", base, dtype, lora)
    np.testing.assert_array_equal(logits(found), expected)
    if way == "export_to_hugging_face":
        # It is documented to merge LoRA, which that format does not have.
        assert trainable(found) == trainable(made(dtype, "plain")[0])
        return
    assert trainable(found) == trainable(lm)
    assert [v.dtype for v in found.backbone.weights] == [v.dtype for v in lm.backbone.weights]
    found_weights = weights(found)
    for path, array in weights(lm).items():
        np.testing.assert_array_equal(found_weights[path], array, err_msg=path)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The files of another backend."""
    folder = tmp_path_factory.mktemp("others")
    environment = {**os.environ, "KERAS_BACKEND": WRITERS[keras.config.backend()]}
    # As in `conftest`, which has looked at this backend: what JAX compiles here is tiny.
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment["PYTHONPATH"] = python_path()
    program = [sys.executable, saved_models.__file__, str(folder)]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("lora", ["plain", "trained lora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_backends_files_hold_the_same_model(dtype, lora, others):
    cell = others / f"{dtype} {lora}"
    expected, saved = np.load(cell / "weights.npz"), np.load(cell / "logits.npz")
    ways = [path.name.partition(".")[0] for path in cell.iterdir() if path.suffix != ".npz"]
    assert len(ways) == 5 - (lora == "plain") - (dtype in QUANTIZATIONS)
    for way in ways:
        lm = read(way, cell / way, others / "base", dtype, lora)
        if dtype == "float32":
            scale = np.abs(saved["logits"]).max()
            np.testing.assert_allclose(logits(lm) / scale, saved["logits"] / scale, atol=1e-5, rtol=0, err_msg=way)
        if way == "export_to_hugging_face" and lora != "plain":
            continue  # merged
        assert trainable(lm) == saved["trainable"].tolist(), way
        found = weights(lm)
        assert found.keys() == set(expected.files), way
        for path in expected.files:
            np.testing.assert_array_equal(found[path], expected[path], err_msg=f"{way}: {path}")


def test_weights_of_another_form_are_refused_with_what_to_call(base, made, tmp_path):
    for dtype, lora in (("float32", "lora"), ("int8", "plain"), ("float32", "plain")):
        made(dtype, lora)[0].save_weights(tmp_path / f"{dtype} {lora}.weights.h5")
    plain = new_model(base, "float32", "plain")
    with pytest.raises(ValueError, match="enable_lora"):
        plain.load_weights(tmp_path / "float32 lora.weights.h5")
    with pytest.raises(ValueError, match="`quantize`"):
        plain.load_weights(tmp_path / "int8 plain.weights.h5")
    with pytest.raises(ValueError, match="not quantized"):
        new_model(base, "int4", "plain").load_weights(tmp_path / "float32 plain.weights.h5")


def test_plain_weights_in_a_model_with_lora_start_lora_anew(base, made, tmp_path):
    made("float32", "plain")[0].save_weights(tmp_path / "plain.weights.h5")
    lm = new_model(base, "float32", "trained lora")
    lm.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_allclose(logits(lm), made("float32", "plain")[1], rtol=1e-6, atol=1e-6)
    values = {path: array for path, array in weights(lm).items() if "lora_" in path}
    assert all(array.any() == path.endswith("_a") for path, array in values.items())  # so that B has a gradient


def test_quantized_preset_is_found_by_keras_hub_and_keeps_its_dtype(base, tmp_path):
    import keras_hub

    lm = kt.T5GemmaSeq2SeqLM.from_preset(str(base), dtype="int8_from_bfloat16")
    lm.save_to_preset(str(tmp_path / "preset"))
    for found in (
        kt.T5GemmaBackbone.from_preset(str(tmp_path / "preset")),
        keras_hub.models.Backbone.from_preset(str(tmp_path / "preset")),
        keras_hub.models.Seq2SeqLM.from_preset(str(tmp_path / "preset")).backbone,
    ):
        assert [v.dtype for v in found.weights] == [v.dtype for v in lm.backbone.weights]
        for ours, theirs in zip(found.weights, lm.backbone.weights, strict=True):
            np.testing.assert_array_equal(*(ops.convert_to_numpy(ops.cast(v, "float32")) for v in (ours, theirs)))
    with pytest.raises(ValueError, match="quantized already, in int8"):
        kt.T5GemmaBackbone.from_preset(str(tmp_path / "preset"), dtype="int4_from_bfloat16")


def test_what_is_frozen_stays_frozen(base, tmp_path):
    lm = new_model(base, "float32", "plain")
    lm.backbone.encoder.trainable = False
    lm.save_to_preset(str(tmp_path / "preset"))
    lm.save(tmp_path / "m.keras")
    for found in (
        kt.T5GemmaSeq2SeqLM.from_preset(str(tmp_path / "preset")),
        keras.models.load_model(tmp_path / "m.keras"),
    ):
        assert trainable(found) == trainable(lm)
        assert found.backbone.encoder.trainable_variables == []
    assert trainable(kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone.from_preset(str(base), trainable=False))) == []


def test_checkpoint_readers_refuse_what_only_keras_reads(made, tmp_path):
    for dtype, lora, remedy in (("float32", "lora", "merge_lora"), ("int8", "plain", "before `quantize`")):
        made(dtype, lora)[0].backbone.save_to_preset(str(tmp_path / dtype))
        with pytest.raises(kt.CheckpointError, match=remedy):
            kt.convert_checkpoint(tmp_path / dtype, tmp_path / "out")


def test_hugging_face_folder_keeps_the_preprocessors_options(base, made, tmp_path):
    options = {"encoder_sequence_length": 21, "decoder_sequence_length": 9, "chat": True, "truncate": "left"}
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor.from_preset(str(base), **options)
    lm = kt.T5GemmaSeq2SeqLM(made("float32", "plain")[0].backbone, preprocessor)
    lm.save_to_preset(str(tmp_path / "preset"))
    kt.export_to_hugging_face(lm, tmp_path / "exported")
    kt.convert_checkpoint(tmp_path / "preset", tmp_path / "converted")
    kt.convert_checkpoint(tmp_path / "converted", tmp_path / "again")
    for folder in ("exported", "converted", "again"):
        found = kt.T5GemmaSeq2SeqLMPreprocessor.from_preset(str(tmp_path / folder))
        assert {name: getattr(found, name) for name in options} == options, folder
