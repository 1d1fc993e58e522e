import keras
import numpy as np
import pytest
from keras import ops

from keras_t5gemma.config import StackConfig
from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.training.callbacks.cross_attention_warmup import CrossAttentionWarmup
from keras_t5gemma.training.steps.model import OwnSteps

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(64, 4)).astype("float32")


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """A stand-in for a decoder block: variables named like the real ones, in next to no time to compile."""

    def build(self, shape):
        names = ("self_attention", "pre_cross_attention_norm", "cross_attention", "feed_forward")
        self.parts = [keras.layers.Dense(shape[-1], use_bias=False, name=name) for name in names]
        for part in self.parts:
            part.build(shape)

    def call(self, x):
        for part in self.parts:
            x = x + ops.tanh(part(x))
        return x


@keras.saving.register_keras_serializable("tests")
class Model(OwnSteps, keras.Model):
    """Any model with the steps of this package."""


def make_model(optimizer, **kwargs):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = Model(inputs, Block(name="layer_1")(Block(name="layer_0")(inputs)))
    model.compile(optimizer, "mse", **kwargs)
    return model


def fit(model, callbacks, batches=None, epochs=1):
    """Batches of 8; as many as the data has, if left out."""
    x, y = (X, Y) if batches is None else (X[: 8 * batches], Y[: 8 * batches])
    return model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)


def weights(model):
    return {variable.path: np.array(ops.convert_to_numpy(variable)) for variable in model.variables}


def moved(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}


class Snapshots(keras.callbacks.Callback):
    """The weights before the first batch and after each."""

    def on_train_begin(self, logs=None):
        self.seen = [weights(self.model)]

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(weights(self.model))


class Crash(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise KeyboardInterrupt


def everything(model):
    return {variable.path for variable in model.variables}


def cross_attention(model):
    return {path for path in everything(model) if "cross_attention" in path}


OPTIMIZERS = {
    "adamw with clipping": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.1),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_warmup_moves_cross_attention_alone_for_its_steps_and_then_everything(make_optimizer):
    model = make_model(make_optimizer())
    snapshots = Snapshots()
    fit(model, [CrossAttentionWarmup(steps=3), snapshots])
    assert cross_attention(model) == {
        f"layer_{i}/{part}/kernel" for i in (0, 1) for part in ("cross_attention", "pre_cross_attention_norm")
    }
    steps = [moved(before, after) for before, after in zip(snapshots.seen, snapshots.seen[1:], strict=False)]
    assert steps == [cross_attention(model)] * 3 + [everything(model)] * 5


def test_warmup_is_the_same_as_training_with_everything_else_not_trainable_and_then_trainable():
    model, expected = make_model(keras.optimizers.SGD(0.1)), make_model(keras.optimizers.SGD(0.1))
    fit(model, [CrossAttentionWarmup(steps=5)])
    blocks = expected.layers[1:]
    frozen = [part for block in blocks for part in block.parts if "cross_attention" not in part.name]
    for trainable, batches in ((False, slice(0, 40)), (True, slice(40, 64))):
        for part in frozen:
            part.trainable = trainable
        expected.compile(keras.optimizers.SGD(0.1), "mse")
        expected.fit(X[batches], Y[batches], batch_size=8, shuffle=False, verbose=0)
    for path, value in weights(expected).items():
        np.testing.assert_allclose(weights(model)[path], value, atol=1e-6, err_msg=path)


def test_warmup_leaves_moments_ready_so_that_adam_makes_no_oversized_steps_at_the_release():
    model = make_model(keras.optimizers.Adam(1e-3, beta_2=0.99))
    model.fit(np.tile(X[:8], (100, 1)), np.tile(Y[:8], (100, 1)), 8, verbose=0, callbacks=[CrossAttentionWarmup(100)])
    snapshots = Snapshots()
    model.fit(np.tile(X[:8], (12, 1)), np.tile(Y[:8], (12, 1)), 8, verbose=0, callbacks=[snapshots])
    path = "layer_0/self_attention/kernel"
    steps = [np.abs(b[path] - a[path]).max() for a, b in zip(snapshots.seen, snapshots.seen[1:], strict=False)]
    # Moments that started at zero here would reach 1.6e-3, and 6e-3 with Adam's usual beta_2 and a longer warm-up.
    assert max(steps) < 1.2e-3


def test_warmup_counts_the_optimizers_steps_so_that_a_run_that_goes_on_goes_on_with_it(tmp_path):
    model = make_model("adam")
    fit(model, [CrossAttentionWarmup(steps=5)], batches=3)
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    snapshots = Snapshots()
    fit(model, [CrossAttentionWarmup(steps=5), snapshots], batches=3)
    assert moved(snapshots.seen[0], snapshots.seen[2]) == cross_attention(model)
    assert moved(snapshots.seen[2], snapshots.seen[3]) == everything(model)


def test_warmup_ends_at_its_step_in_a_later_epoch():
    model = make_model("adam")
    snapshots = Snapshots()
    warmup = CrossAttentionWarmup(steps=3)
    fit(model, [warmup, snapshots], batches=2, epochs=2)
    assert moved(snapshots.seen[0], snapshots.seen[3]) == cross_attention(model)
    assert moved(snapshots.seen[3], snapshots.seen[4]) == everything(model)
    before = weights(model)
    fit(model, [warmup], batches=1)
    assert moved(before, weights(model)) == everything(model)


@pytest.mark.parametrize("crash", [False, True])
def test_warmup_that_fit_did_not_finish_does_not_outlive_it(crash):
    model = make_model("adam")
    warmup = CrossAttentionWarmup(steps=100)
    if crash:
        with pytest.raises(KeyboardInterrupt):
            fit(model, [warmup, Crash()])
    else:
        fit(model, [warmup], batches=2)
    assert "train_step" not in vars(model)
    before = weights(model)
    fit(model, [], batches=1)
    assert moved(before, weights(model)) == everything(model)


def test_warmup_after_a_crash_goes_on_with_the_same_callback_or_another():
    model = make_model("adam")
    warmup = CrossAttentionWarmup(steps=5)
    with pytest.raises(KeyboardInterrupt):
        fit(model, [warmup, Crash()])
    for callback, batches in ((warmup, 1), (CrossAttentionWarmup(steps=5), 2)):
        before = weights(model)
        fit(model, [callback], batches=batches)
        assert moved(before, weights(model)) == cross_attention(model)
    fit(model, [warmup], batches=1)
    assert moved(before, weights(model)) == everything(model)


def test_warmup_keeps_what_was_not_trainable_before():
    model = make_model("adam")
    model.layers[1].trainable = False
    model.compile("adam", "mse")
    before = weights(model)
    fit(model, [CrossAttentionWarmup(steps=2)])
    assert moved(before, weights(model)) == {path for path in everything(model) if path.startswith("layer_1")}


def test_warmup_with_gradient_accumulation_counts_updates():
    model = make_model(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2))
    snapshots = Snapshots()
    fit(model, [CrossAttentionWarmup(steps=2), snapshots])
    assert moved(snapshots.seen[0], snapshots.seen[5]) == cross_attention(model)
    assert moved(snapshots.seen[5], snapshots.seen[6]) == everything(model)


@pytest.mark.skipif(keras.config.backend() == "torch", reason="Keras has no steps_per_execution on PyTorch")
def test_warmup_with_steps_per_execution_ends_with_the_execution():
    model = make_model("adam", steps_per_execution=2)
    snapshots = Snapshots()
    fit(model, [CrossAttentionWarmup(steps=3), snapshots])
    assert int(model.optimizer.iterations) == 8
    assert moved(snapshots.seen[0], snapshots.seen[2]) == cross_attention(model)
    assert moved(snapshots.seen[2], snapshots.seen[3]) == everything(model)


def test_warmup_does_not_get_in_the_way_of_validation():
    model = make_model("adam")
    history = model.fit(X, Y, epochs=2, validation_data=(X, Y), verbose=0, callbacks=[CrossAttentionWarmup(steps=3)])
    assert history.history["val_loss"][-1] == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-5)


@pytest.mark.parametrize("steps", [0, 2.5, True, None])
def test_warmup_with_steps_out_of_range_names_them(steps):
    with pytest.raises(ValueError, match="`steps` must be a positive integer"):
        CrossAttentionWarmup(steps)


def test_warmup_of_a_model_without_trainable_cross_attention_is_refused():
    inputs = keras.Input((4,))
    model = Model(inputs, keras.layers.Dense(4)(inputs))
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="no trainable variable with 'cross_attention'"):
        fit(model, [CrossAttentionWarmup(steps=3)])


def test_warmup_of_a_model_without_this_packages_steps_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"needs a `T5GemmaSeq2SeqLM`.*Received: Sequential"):
        fit(model, [CrossAttentionWarmup(steps=3)])


def test_warmup_with_moving_averages_is_refused():
    model = make_model(keras.optimizers.Adam(use_ema=True))
    with pytest.raises(ValueError, match="use_ema=False"):
        fit(model, [CrossAttentionWarmup(steps=3)])


def test_warmup_of_the_real_model_trains_its_cross_attention_and_the_norms_around_it():
    stack = dict(num_layers=1, intermediate_dim=8, num_query_heads=2, num_key_value_heads=1, head_dim=4)
    backbone = T5GemmaBackbone(
        StackConfig(hidden_dim=8, **stack), StackConfig(hidden_dim=4, **stack), vocabulary_size=64
    )
    model = T5GemmaSeq2SeqLM(backbone)
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), weighted_metrics=[])
    data = pretraining_dataset(np.tile(np.arange(10, 60), 9), None, PrefixLM(4, 4), batch_size=2)
    before = weights(model)
    model.fit(data, steps_per_epoch=2, verbose=0, callbacks=[CrossAttentionWarmup(steps=2)])
    parts = [f"cross_attention/{name}/kernel" for name in ("query", "key", "value", "output")]
    parts += [f"{place}_cross_attention_norm/scale" for place in ("pre", "post")]
    assert moved(before, weights(model)) == {f"decoder/layer_0/{part}" for part in parts}
