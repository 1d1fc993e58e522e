"""Subclasses, losses and metrics of a user's own, as Keras documents them."""

import keras
import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras import ops

import keras_t5gemma as kt

CONFIG = tiny_config(num_layers=1)
INPUTS = loud_inputs(CONFIG)
LABELS, WEIGHTS = INPUTS["decoder_token_ids"], INPUTS["decoder_padding_mask"]
DATA = {"x": INPUTS, "y": LABELS, "sample_weight": WEIGHTS, "verbose": 0}


class WithLogits(kt.T5GemmaSeq2SeqLM):
    """A loss that reads the logits, and is a hundred larger."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        penalty = 100.0 + 0.0 * ops.mean(y_pred)
        return super().compute_loss(x, y, y_pred, sample_weight, training) + penalty


class WithoutLogits(kt.T5GemmaSeq2SeqLM):
    """A loss that is a hundred larger, without the logits."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, None, sample_weight, training) + 100.0


@pytest.fixture(scope="module")
def plain():
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    return lm.evaluate(**DATA, return_dict=True)


@pytest.mark.parametrize("cls", [WithLogits, WithoutLogits])
def test_loss_of_an_overridden_compute_loss_is_what_is_reported(cls, plain):
    lm = cls(loud_backbone(CONFIG))
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    for logs in (
        lm.evaluate(**DATA, return_dict=True),
        {name: values[0] for name, values in lm.fit(**DATA).history.items()},
    ):
        assert logs["loss"] == pytest.approx(plain["loss"] + 100, rel=1e-5)
        assert logs["accuracy"] == pytest.approx(plain["accuracy"])


def test_metrics_of_an_earlier_compile_are_gone():
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    metric = keras.metrics.SparseTopKCategoricalAccuracy(k=5)
    lm.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), weighted_metrics=[metric])
    assert "sparse_top_k_categorical_accuracy" in lm.evaluate(**DATA, return_dict=True)
    lm.compile()
    assert set(lm.evaluate(**DATA, return_dict=True)) == {"loss", "accuracy"}


@pytest.mark.parametrize(
    "loss", ["sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy()], ids=["name", "instance"]
)
def test_loss_of_probabilities_is_refused_with_the_one_of_logits(loss):
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    with pytest.raises(ValueError, match=r"`loss` must take logits.*from_logits=True"):
        lm.compile(loss=loss)


def test_labels_of_a_teachers_view_name_the_loss_to_compile_with():
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    y = {"labels": LABELS, "teacher_positions": np.zeros_like(LABELS)}
    with pytest.raises(ValueError, match=r"takes labels.*labels, teacher_positions.*Distillation"):
        lm.train_on_batch(INPUTS, y, WEIGHTS)
