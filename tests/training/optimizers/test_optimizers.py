"""The optimizer of a run: its schedule, what it shrinks, what it clips."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_t5gemma.training.optimizers.factory import OPTIMIZERS, optimizer


def rate(made, step):
    return float(made._learning_rate(step))


def test_learning_rate_warms_up_and_follows_a_cosine_to_its_end():
    made = optimizer(learning_rate=0.5, steps=100, warmup_steps=20, final_fraction=0.2)
    assert rate(made, 0) == 0
    assert rate(made, 10) == pytest.approx(0.25)
    assert rate(made, 20) == pytest.approx(0.5)
    assert rate(made, 60) == pytest.approx(0.5 * (0.2 + 0.8 * 0.5))
    assert rate(made, 100) == pytest.approx(0.1)
    assert rate(made, 900) == pytest.approx(0.1)


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert rate(optimizer(learning_rate=0.5, steps=10, warmup_steps=0), 0) == pytest.approx(0.5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_shrink_but_norms_and_embeddings_do_not(name):
    made = optimizer(name, learning_rate=0.1, steps=10, warmup_steps=0, weight_decay=0.5)
    variables = [keras.Variable(np.ones((4, 4), "float32"), name=n) for n in ("kernel", "scale", "embeddings")]
    made.build(variables)
    made.apply([ops.zeros((4, 4)) for _ in variables], variables)
    kernel, scale, embeddings = (ops.convert_to_numpy(v.value) for v in variables)
    np.testing.assert_allclose(kernel, 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(scale, 1)
    np.testing.assert_array_equal(embeddings, 1)


def test_gradients_are_clipped_at_their_global_norm():
    made = optimizer(learning_rate=1.0, steps=10, warmup_steps=0, clip_norm=0.5)
    gradients = made._clip_gradients([ops.full((4,), 3.0), ops.full((1,), 8.0)])
    norm = np.sqrt(sum((ops.convert_to_numpy(g) ** 2).sum() for g in gradients))
    assert norm == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, r"`name` must be one of adamw, adafactor, muon\. Received: 'sgd'"),
        ({"steps": 0}, "`steps`"),
        ({"steps": 2.5}, "`steps`"),
        ({"warmup_steps": -1}, "`warmup_steps`"),
        ({"warmup_steps": 11}, "at most steps=10"),
        ({"learning_rate": 0}, "`learning_rate`"),
        ({"final_fraction": 1.5}, "`final_fraction`"),
        ({"lr": 0.5}, "`lr` is not an argument: use `learning_rate=0.5`"),
    ],
)
def test_argument_out_of_range_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        optimizer(**{"learning_rate": 0.1, "steps": 10, "warmup_steps": 2, **changes})


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_copy_from_the_config_decays_no_other_weights(name):
    made = optimizer(name)
    copied = type(made).from_config(
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(made)).get_config()
    )
    weights = [keras.Variable(np.ones((2, 2)), name=name) for name in ("kernel", "embeddings", "scale")]
    for known in (made, copied):
        known.build(weights)
        assert [known._use_weight_decay(weight) for weight in weights] == [True, False, False]
