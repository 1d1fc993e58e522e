"""The loss in chunks against the plain one on logits: value, accuracy, gradients, and what `fit` makes of them."""

import keras
import numpy as np
import pytest
from helpers.gradients import gradients
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras import ops

from keras_t5gemma.kernels.cross_entropy.chunks import CHUNK_BYTES
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.training.losses.cross_entropy import VocabularyCrossEntropy

B, T, D, V = 3, 10, 8, 57
OPTIONS = {
    "plain": {},
    "z_loss": {"z_loss": 0.05},
    "label_smoothing": {"label_smoothing": 0.3},
    "both": {"z_loss": 0.05, "label_smoothing": 0.3},
}


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {
        "hidden": generator.standard_normal((B, T, D)).astype("float32"),
        "table": generator.standard_normal((V, D)).astype("float32"),
        "labels": generator.integers(0, V, (B, T)).astype("int32"),
        "weights": generator.integers(0, 3, (B, T)).astype("float32"),
    }


def numpy_loss(arrays, cap, z_loss=0.0, label_smoothing=0.0):
    """The definition, in float64."""
    logits = np.einsum("btd,vd->btv", arrays["hidden"].astype("float64"), arrays["table"].astype("float64"))
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    log_sum = np.log(np.exp(logits).sum(-1))
    target = np.eye(V)[arrays["labels"]] * (1 - label_smoothing) + label_smoothing / V
    losses = log_sum - (target * logits).sum(-1) + z_loss * log_sum**2
    weights = arrays["weights"] / arrays["weights"].sum()
    return (losses * weights).sum(), ((logits.argmax(-1) == arrays["labels"]) * weights).sum()


def from_hidden_states(loss, arrays, tokens, **kwargs):
    tensors = {name: ops.convert_to_tensor(value) for name, value in arrays.items()}
    return loss.from_hidden_states(**tensors, chunk_bytes=4 * V * B * tokens, **kwargs)


@pytest.mark.parametrize(
    ("tokens", "cap", "training"), [(1, 3.0, True), (4, None, True), (4, 3.0, False), (10, 3.0, True), (99, 3.0, False)]
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_accuracy_are_by_definition_whatever_the_chunks(arrays, options, cap, tokens, training):
    loss = VocabularyCrossEntropy(**options)
    expected, expected_accuracy = numpy_loss(arrays, cap, **options)
    got, accuracy, total = from_hidden_states(loss, arrays, tokens, cap=cap, training=training)
    assert float(got) == pytest.approx(expected, rel=1e-5)
    assert float(accuracy) == pytest.approx(expected_accuracy, abs=1e-6)
    assert float(total) == arrays["weights"].sum()
    logits = ops.einsum("btd,vd->btv", arrays["hidden"], arrays["table"])
    logits = logits if cap is None else cap * ops.tanh(logits / cap)
    assert float(loss(arrays["labels"], logits, arrays["weights"])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("train_table", [True, False])
def test_gradients_are_those_of_the_definition(arrays, options, cap, train_table):
    """By central differences of the definition in float64."""
    loss = VocabularyCrossEntropy(**options)

    def total(hidden, table):
        tensors = {**arrays, "hidden": hidden, "table": table}
        return from_hidden_states(loss, tensors, 4, cap=cap, train_table=train_table)[0]

    got = gradients(total, arrays["hidden"], arrays["table"])
    generator = np.random.default_rng(1)
    for name, gradient in zip(("hidden", "table"), got, strict=True):
        if name == "table" and not train_table:
            assert not np.any(gradient)
            continue
        for _ in range(5):
            direction, exact = generator.standard_normal(arrays[name].shape), arrays[name].astype("float64")
            ends = [
                numpy_loss({**arrays, name: exact + sign * 1e-5 * direction}, cap, **options)[0] for sign in (1, -1)
            ]
            assert (gradient * direction).sum() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-5)


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="gradients are a function's on JAX, a tape's on TensorFlow"
)
def test_gradients_are_given_once_and_a_second_backward_says_so(arrays):
    import torch

    arrays = {name: torch.tensor(array) for name, array in arrays.items()}
    arrays["hidden"].requires_grad_()
    loss, *_ = from_hidden_states(VocabularyCrossEntropy(), arrays, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives them once"):
        loss.backward()


def test_loss_of_nothing_but_padding_is_zero(arrays):
    arrays["weights"][:] = 0
    got, accuracy, total = from_hidden_states(VocabularyCrossEntropy(), arrays, 4)
    assert (float(got), float(accuracy), float(total)) == (0, 0, 0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_label_of_minus_100_or_of_weight_zero_changes_nothing(arrays, options):
    """In value and gradients, whichever way into the loss."""
    loss = VocabularyCrossEntropy(**options)
    arrays["weights"][0] = 0
    clean = {**arrays, "weights": np.where(np.arange(T) % 3 == 1, 0, arrays["weights"]).astype("float32")}
    spoiled = {**arrays, "labels": np.where(np.arange(T) % 3 == 1, -100, arrays["labels"])}
    spoiled["labels"][0] = [V + 3, -1, -100, 2**30, 0] * 2

    def total(given):
        return lambda hidden: from_hidden_states(loss, {**given, "hidden": hidden}, 4, cap=3.0)[0]

    found, expected = (gradients(total(given), arrays["hidden"])[0] for given in (spoiled, clean))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected).max() > 0.01
    for training in (True, False):
        found, expected = (from_hidden_states(loss, given, 4, training=training) for given in (spoiled, clean))
        assert [float(x) for x in found] == [float(x) for x in expected]
    logits = ops.einsum("btd,vd->btv", arrays["hidden"], arrays["table"])
    found, expected = (float(loss(given["labels"], logits, given["weights"])) for given in (spoiled, clean))
    assert found == expected
    # Without weights; and with one per row, 0 for the row whose labels are out of range.
    rows, kept = np.array([0, 2, 1], "float32"), (spoiled["labels"] != -100).astype("float32")
    for labels, weights, same in (
        (spoiled["labels"], rows, kept * rows[:, None]),
        (np.where(kept, arrays["labels"], -100), None, kept),
    ):
        given, expected = ({**arrays, "labels": labels, "weights": each} for each in (weights, same))
        assert float(loss(labels, logits, weights)) == float(loss(labels, logits, same))
        tensors = {name: array for name, array in given.items() if array is not None}
        assert float(from_hidden_states(loss, tensors, 4)[0]) == float(from_hidden_states(loss, expected, 4)[0])


@pytest.mark.parametrize(("labels", "weights"), [((B, T - 1), (B, T - 1)), ((B, T), (B, T - 1)), ((B, T), (B + 1,))])
def test_shape_that_does_not_fit_the_decoder_is_refused(arrays, labels, weights):
    given = {**arrays, "labels": np.zeros(labels, "int32"), "weights": np.ones(weights, "float32")}
    logits = ops.zeros((B, T, V))
    for call in (
        lambda: from_hidden_states(VocabularyCrossEntropy(), given, 4),
        lambda: VocabularyCrossEntropy()(given["labels"], logits, given["weights"]),
    ):
        with pytest.raises(ValueError, match=r"`(y|sample_weight)` must hold .* Received: shape"):
            call()


def train(config, loss, chunk_bytes, monkeypatch, *, logits=False, dtype="float32", lora=False):
    """Losses of two `fit` epochs, and the weights after them.

    Args:
        chunk_bytes: so small that there are several chunks.
        logits: whether a metric of its own makes the model compute logits.
    """
    monkeypatch.setitem(CHUNK_BYTES, keras.config.backend(), chunk_bytes)
    keras.utils.set_random_seed(0)
    backbone = loud_backbone(config, dtype=dtype)
    if lora:
        backbone.enable_lora(2)
        for variable in backbone.trainable_variables:
            variable.assign(np.random.default_rng(1).standard_normal(tuple(variable.shape)) * 0.1)
    lm = T5GemmaSeq2SeqLM(backbone)
    metrics = {"weighted_metrics": [keras.metrics.SparseCategoricalAccuracy()]} if logits else {}
    lm.compile(optimizer=keras.optimizers.SGD(0.05), loss=loss, **metrics)
    inputs = loud_inputs(config)
    weights = inputs["decoder_padding_mask"].astype("float32")
    history = lm.fit(
        inputs, inputs["decoder_token_ids"], sample_weight=weights, batch_size=3, epochs=2, shuffle=False, verbose=0
    )
    evaluated = lm.evaluate(inputs, inputs["decoder_token_ids"], sample_weight=weights, verbose=0, return_dict=True)
    return history.history, evaluated, [ops.convert_to_numpy(w.value) for w in backbone.weights]


@pytest.mark.parametrize(
    "case",
    [{}, {"tie_embeddings": False}, {"final_logit_soft_cap": None}, {"lora": True}],
    ids=["tied", "untied", "uncapped", "lora"],
)
def test_fit_and_evaluate_give_what_the_loss_on_logits_gives(case, monkeypatch):
    lora = case.pop("lora", False)
    config = tiny_config(balanced=False, num_layers=1, **case)
    loss = {"z_loss": 0.01, "label_smoothing": 0.1}
    runs = [
        train(config, VocabularyCrossEntropy(**loss), 4 * 128 * 3 * 4, monkeypatch, logits=logits, lora=lora)
        for logits in (False, True)
    ]
    (history, evaluated, weights), (expected_history, expected_evaluated, expected_weights) = runs
    np.testing.assert_allclose(history["loss"], expected_history["loss"], rtol=1e-5)
    np.testing.assert_allclose(history["accuracy"], expected_history["sparse_categorical_accuracy"], rtol=1e-5)
    assert evaluated["loss"] == pytest.approx(expected_evaluated["loss"], rel=1e-5)
    assert evaluated["accuracy"] == pytest.approx(expected_evaluated["sparse_categorical_accuracy"], rel=1e-5)
    for got, expected in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_fit_in_mixed_bfloat16_is_near_the_loss_on_logits(monkeypatch):
    config = tiny_config(balanced=False, num_layers=1)
    losses = [
        train(config, VocabularyCrossEntropy(), 4 * 128 * 3 * 4, monkeypatch, logits=logits, dtype="mixed_bfloat16")[0]
        for logits in (False, True)
    ]
    np.testing.assert_allclose(losses[0]["loss"], losses[1]["loss"], rtol=2e-2)


def test_fit_by_default_never_makes_logits(monkeypatch):
    config = tiny_config(num_layers=1)
    lm = T5GemmaSeq2SeqLM(loud_backbone(config))
    train_step, project, steps = lm.train_step, lm.head._project, []

    def watched_step(*args):
        with monkeypatch.context() as patch:
            patch.setattr(lm.head, "_project", lambda _: pytest.fail("logits were made"))
            steps.append(1)
            return train_step(*args)

    monkeypatch.setattr(lm, "train_step", watched_step)
    inputs = loud_inputs(config)
    assert set(lm.fit(inputs, inputs["decoder_token_ids"], verbose=0).history) == {"loss", "accuracy"}
    assert steps
    assert lm.head._project == project


def test_model_with_a_loss_of_the_users_own_gets_logits():
    config = tiny_config(num_layers=1)
    lm = T5GemmaSeq2SeqLM(loud_backbone(config))
    shapes = []

    def loss(y_true, y_pred):
        shapes.append(tuple(y_pred.shape)[-1])
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    lm.compile(optimizer="sgd", loss=loss, weighted_metrics=[])
    inputs = loud_inputs(config)
    lm.fit(inputs, inputs["decoder_token_ids"], verbose=0)
    assert set(shapes) == {config.vocabulary_size}


@pytest.mark.parametrize(("name", "value"), [("z_loss", -1.0), ("label_smoothing", 1.0), ("label_smoothing", -0.1)])
def test_option_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        VocabularyCrossEntropy(**{name: value})


def test_loss_comes_back_from_its_config():
    loss = VocabularyCrossEntropy(z_loss=1e-4, label_smoothing=0.1)
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert again.get_config() == loss.get_config()
