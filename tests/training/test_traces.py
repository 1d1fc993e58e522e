"""TensorFlow traces a step once, whatever creates variables with the first batch."""

import keras
import numpy as np
import pytest
from helpers.one_step import language_model

DATA = {"encoder_token_ids": np.array([[5, 6, 1]] * 4), "decoder_token_ids": np.array([[2, 3, 4]] * 4)}


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="other backends build metrics before the step")
@pytest.mark.parametrize("metrics", ["auto", ["accuracy", "sparse_top_k_categorical_accuracy"]], ids=["own", "strings"])
def test_first_step_is_traced_once(metrics):
    lm = language_model(weighted_metrics=metrics)
    traces, compute_loss = [], lm.compute_loss

    def counted(*args, training=True, **kwargs):
        traces.append(training)
        return compute_loss(*args, training=training, **kwargs)

    lm.compute_loss = counted
    history = lm.fit(DATA, batch_size=2, verbose=0).history
    assert set(history) == {"loss", *(["accuracy"] if metrics == "auto" else metrics)}
    lm.evaluate(DATA, batch_size=2, verbose=0)
    assert traces == [True, False]
