"""In the middle of `fit`: callbacks generate, score, save and export, and training goes on as if they had not."""

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import TEXTS, train_tiny_tokenizer
from keras import ops

import keras_t5gemma as kt

CONFIG = tiny_config(num_layers=1, vocabulary_size=512, dropout=0.2)
PAIRS = {"encoder_text": [text[:16] for text in TEXTS[:4]], "decoder_text": [text[-8:] for text in TEXTS[:4]]}
# On JAX equal to the bit. TensorFlow and PyTorch promise no such thing of two runs.
TOLERANCE = 0 if keras.config.backend() == "jax" else 1e-6
STEPS_AT_ONCE = 1 if keras.config.backend() == "torch" else 2  # Keras has no other there


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory):
    proto = train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    return kt.T5GemmaSeq2SeqLMPreprocessor(kt.T5GemmaTokenizer(proto=proto), 16, 16)


class Asking(keras.callbacks.Callback):
    """Uses the model in every way that reads it, by closure and by `self.model`."""

    def __init__(self, lm, folder):
        super().__init__()
        self.lm, self.folder, self.batches = lm, folder, 0

    def on_train_batch_begin(self, batch, logs=None):
        self.lm.generate("who?", max_length=4)

    def on_train_batch_end(self, batch, logs=None):
        lm, folder = self.lm, self.folder / str(self.batches)
        folder.mkdir(parents=True)
        self.batches += 1
        answer = lm.generate("who?", max_length=6, seed=1)
        assert "".join(lm.stream("who?", max_length=6, seed=1)) == answer
        if any("lora" in variable.path for variable in lm.trainable_variables):
            kt.save_lora(lm, folder / "adapter")
        elif self.batches == 1:  # values are back now, and this must not matter for what follows
            assert self.model.generate("who?", max_length=6, seed=1) == answer
            assert np.isfinite(lm.score("who?", "me")["log_likelihood"])
            assert lm.embed("who?").any()
            lm.save(folder / "lm.keras")
            lm.backbone.save_to_preset(folder / "backbone")
        else:
            kt.export_to_hugging_face(lm, folder / "exported")
            lm.save_weights(folder / "lm.weights.h5")
        self.weights = lm.backbone.get_weights()

    def on_test_batch_end(self, batch, logs=None):
        self.lm.generate("who?", max_length=4)


def trained(preprocessor, folder, kind, asks):
    """`(lm, callback)` after eight rows; `kind` "plain" or "all at once"."""
    keras.utils.set_random_seed(0)
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG), preprocessor)
    asking = Asking(lm, folder / "asked")
    # In no list, Keras would run it in threads of its own.
    callbacks, options = asking if asks else [], {"sampler": kt.TopKTopPSampler(k=9, seed=0)}
    pairs = [dict(zip(PAIRS, row, strict=True)) for row in zip(*PAIRS.values(), strict=True)]
    data = kt.supervised_dataset(pairs, preprocessor, batch_size=2)
    if kind == "all at once":
        lm.backbone.enable_lora(2)
        options |= {"accumulation_steps": 2, "steps_per_execution": STEPS_AT_ONCE}
        checkpoint = kt.TrainingCheckpoint(folder / f"run_{asks}", save_every=STEPS_AT_ONCE)
        callbacks, data = (
            [kt.CrossAttentionWarmup(STEPS_AT_ONCE), *([asking] if asks else []), checkpoint],
            checkpoint.data(PAIRS, batch_size=2),
        )
    lm.compile(optimizer=keras.optimizers.Adam(1e-2), **options)
    validation = {name: texts[:2] for name, texts in PAIRS.items()} if kind == "plain" else None
    fit = {
        "steps_per_epoch": 2 * STEPS_AT_ONCE if kind == "all at once" else 2,
        "validation_data": validation,
        "validation_steps": 1,
    }
    lm.fit(data, epochs=1, callbacks=callbacks, verbose=0, **fit)
    return lm, asking


@pytest.mark.parametrize("kind", ["plain", "all at once"])
def test_callback_that_uses_the_model_leaves_the_training_as_it_was(preprocessor, tmp_path, kind):
    expected, _ = trained(preprocessor, tmp_path, kind, asks=False)
    lm, asking = trained(preprocessor, tmp_path, kind, asks=True)
    assert asking.batches == 2
    states = [model.variables + model.optimizer.variables for model in (lm, expected)]
    for found, other in zip(*states, strict=True):
        np.testing.assert_allclose(*map(ops.convert_to_numpy, (found, other)), rtol=0, atol=TOLERANCE)
    for found, other in zip(asking.weights, lm.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(found, other)
    if kind == "plain":
        saved = kt.T5GemmaBackbone.from_preset(tmp_path / "asked" / "1" / "exported").get_weights()
        for found, other in zip(saved, lm.backbone.get_weights(), strict=True):
            np.testing.assert_array_equal(found, other)
