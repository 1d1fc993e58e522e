"""AdamW in one pass: Keras's own numbers."""

import gc

import keras
import numpy as np
import pytest
from keras import ops

from keras_t5gemma.training.optimizers.adamw import AdamW

SETTINGS = {"learning_rate": 0.1, "weight_decay": 0.2, "beta_1": 0.8, "beta_2": 0.97, "epsilon": 1e-3}


def trained(optimizer, dtype="float32", steps=4, rounded=False):
    """Weights after a few steps on gradients that differ in size, one of them exempt from weight decay."""
    rng = np.random.default_rng(0)
    weights = [keras.Variable(rng.normal(size=(3, 4)), dtype=dtype, name=name) for name in ("kernel", "scale")]
    if rounded:
        for weight in weights:
            weight.assign(ops.cast(ops.cast(weight, "bfloat16"), "float32"))
    optimizer.exclude_from_weight_decay(var_names=["scale"])
    for _ in range(steps):
        grads = [rng.normal(size=(3, 4)) * 10.0 ** rng.integers(-3, 2, (3, 1)) for _ in weights]
        grads = [ops.cast(ops.convert_to_tensor(grad, "float32"), "bfloat16" if rounded else dtype) for grad in grads]
        optimizer.apply([ops.cast(grad, dtype) for grad in grads], weights)
    return [ops.convert_to_numpy(ops.cast(weight, "float32")) for weight in weights]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"global_clipnorm": 0.5}, {"use_ema": True}], ids=str)
def test_steps_are_those_of_keras(options):
    ours, theirs = (trained(cls(**SETTINGS, **options)) for cls in (AdamW, keras.optimizers.AdamW))
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_clipnorm": 0.5},
        {"clipnorm": 0.5},
        {"amsgrad": True},
        {"use_ema": True, "ema_overwrite_frequency": 2},
        {"gradient_accumulation_steps": 2},
        {"moments_dtype": "bfloat16"},
        {"master_weights": True, "global_clipnorm": 0.5},
    ],
    ids=str,
)
def test_bfloat16_weights_go_where_those_of_float32_go(options):
    """From gradients that bfloat16 holds, so that only the rounding of weights is left: a unit of the last place."""
    ours = AdamW(**{**SETTINGS, "learning_rate": 0.01}, **options)
    near = trained(ours, dtype="bfloat16")
    exact = trained(
        AdamW(**{**SETTINGS, "learning_rate": 0.01}, **{**options, "moments_dtype": "float32"}), rounded=True
    )
    np.testing.assert_allclose(near, exact, atol=2e-3, rtol=4 * 2**-8)
    assert ours.get_config()["moments_dtype"] == options.get("moments_dtype", "float32")
    moments = {
        keras.backend.standardize_dtype(variable.dtype) for variable in ours.variables if len(variable.shape) == 2
    }
    assert moments == ({"bfloat16"} if "moments_dtype" in options else {"float32"})


def test_small_steps_add_up_in_bfloat16():
    """200 steps of a fiftieth of a unit each: rounded to the nearest, none would be left."""
    for options in ({}, {"master_weights": True}):
        made = AdamW(learning_rate=1e-4, weight_decay=0.0, **options)
        weights = [keras.Variable(np.ones((32, 32)), dtype="bfloat16", name="kernel")]
        for _ in range(200):
            made.apply([ops.ones((32, 32), "bfloat16")], weights)
        values = ops.convert_to_numpy(ops.cast(weights[0], "float32"))
        assert values.mean() == pytest.approx(1 - 200 * 1e-4, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 0.01}], ids=str)
def test_rows_looked_up_twice_get_both_gradients(options):
    """As products with one-hot rows do; Keras on TensorFlow squares the gradients of a repeated row one by one."""
    ids, targets = np.array([[1, 1, 2], [2, 4, 4]]), np.array([[1.0], [2.0]])

    def table_after_training(first, inputs, optimizer):
        model = keras.Sequential([first, keras.layers.Flatten(), keras.layers.Dense(1, kernel_initializer="ones")])
        model.build(inputs.shape)
        first.set_weights([np.random.default_rng(0).normal(size=(5, 3))])
        model.compile(optimizer=optimizer, loss="mse")
        model.fit(inputs, targets, epochs=3, verbose=0)
        return first.get_weights()[0]

    looked_up = table_after_training(keras.layers.Embedding(5, 3), ids, AdamW(**SETTINGS, **options))
    one_hot = keras.layers.Dense(3, use_bias=False)
    multiplied = table_after_training(one_hot, np.eye(5)[ids], keras.optimizers.AdamW(**SETTINGS, **options))
    np.testing.assert_allclose(looked_up, multiplied, atol=1e-5)


def test_state_goes_on_from_keras_own():
    def after(first, second):
        rng = np.random.default_rng(1)
        weight, optimizer = keras.Variable(np.ones((2, 3)), name="kernel"), first(**SETTINGS)
        grads = [ops.convert_to_tensor(rng.normal(size=(2, 3)), "float32") for _ in range(4)]
        for grad in grads[:2]:
            optimizer.apply([grad], [weight])
        following = second.from_config(optimizer.get_config())
        following.build([weight])
        for variable, value in zip(following.variables, optimizer.variables, strict=True):
            variable.assign(value)
        for grad in grads[2:]:
            following.apply([grad], [weight])
        return ops.convert_to_numpy(weight)

    theirs = keras.optimizers.AdamW
    np.testing.assert_allclose(after(theirs, AdamW), after(theirs, theirs), rtol=2e-6)


def test_optimizer_trains_after_another_ones_model_is_gone():
    for _ in range(2):
        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile(optimizer=AdamW(**SETTINGS), loss="mse")
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
        assert np.isfinite(model.get_weights()[0]).all()
        del model
        gc.collect()
        keras.backend.clear_session()
