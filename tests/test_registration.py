"""Keras and keras-hub find this package's classes in files after `import keras_t5gemma`, in whatever order."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer

import keras_t5gemma as kt
from keras_t5gemma.registration import REGISTERING

PACKAGE = Path(kt.__file__).parent
CONFIG = tiny_config(num_layers=1, vocabulary_size=512)
READ = """
x = dict(np.load("inputs.npz"))
model = keras.models.load_model("m.keras")
preset = keras_hub.models.Seq2SeqLM.from_preset("preset")
np.savez("found.npz", model=model.predict(x, verbose=0), preset=preset.predict(x, verbose=0))
print(type(model.optimizer).__name__, type(preset).__name__, type(preset.preprocessor).__name__)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model as a `.keras` file and as a preset, with its inputs and logits."""
    folder = tmp_path_factory.mktemp("saved")
    train_tiny_tokenizer(folder / "tokenizer.model")
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(kt.T5GemmaTokenizer(str(folder / "tokenizer.model")), 16, 13)
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG), preprocessor)
    x = loud_inputs(CONFIG)
    lm.compile(optimizer=kt.optimizer("adamw", learning_rate=1e-3, steps=10, warmup_steps=1))
    lm.fit(x, x["decoder_token_ids"], verbose=0)
    lm.save(folder / "m.keras")
    lm.save_to_preset(folder / "preset")
    np.savez(folder / "inputs.npz", **x)
    np.save(folder / "logits.npy", lm.predict(x, verbose=0))
    return folder


def run(code, folder):
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()


def test_saved_models_load_in_a_new_process_before_any_class_is_named(folder):
    names = run("import keras_t5gemma as kt, keras, keras_hub, numpy as np" + READ, folder)
    assert names[-3:] == ["AdamW", "T5GemmaSeq2SeqLM", "T5GemmaSeq2SeqLMPreprocessor"]
    found, expected = np.load(folder / "found.npz"), np.load(folder / "logits.npy")
    np.testing.assert_array_equal(found["model"], expected)
    np.testing.assert_array_equal(found["preset"], expected)


@pytest.mark.parametrize(
    "imports",
    [
        "import keras, keras_t5gemma",
        # Brings Keras in while a module of this package is still being imported.
        "from keras_t5gemma.inference.buckets import Buckets; import keras",
    ],
    ids=["after Keras", "by a module"],
)
def test_classes_are_registered_in_whatever_order_modules_are_imported(imports, tmp_path):
    look_up = "; print(keras.saving.get_registered_object('keras_t5gemma>T5GemmaSeq2SeqLM').__name__)"
    assert run(imports + look_up, tmp_path)[-1] == "T5GemmaSeq2SeqLM"


def test_every_registered_class_is_in_a_module_of_the_table():
    pattern = re.compile(r"^@keras\.saving\.register_keras_serializable", re.MULTILINE)
    found = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
    }
    assert found == set(REGISTERING)
