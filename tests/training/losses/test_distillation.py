"""Distillation against its definition on whole logits: value, gradients, and what `fit` makes of them."""

import functools

import grain
import keras
import numpy as np
import pytest
from helpers.distilled import batches, gemma, student, values
from helpers.gradients import gradients
from keras import ops

from keras_t5gemma.kernels.cross_entropy.chunks import CHUNK_BYTES
from keras_t5gemma.training.losses.distillation import Distillation
from keras_t5gemma.training.losses.stored_teacher import StoredTeacher, store_teacher_logits

B, T, P, D, V = 2, 7, 11, 6, 40
CAP = 3.0


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    positions = generator.integers(0, P, (B, T)).astype("int32")
    positions[0, 1] = positions[1, 4:] = -1
    weights = generator.integers(1, 3, (B, T)).astype("float32")
    weights[1, 5:] = weights[0, 2] = 0
    return {
        "hidden": generator.standard_normal((B, T, D)).astype("float32"),
        "table": generator.standard_normal((V, D)).astype("float32"),
        "weights": weights,
        "y": {
            "labels": generator.integers(0, V, (B, T)).astype("int32"),
            "teacher_token_ids": generator.integers(0, V, (B, P)).astype("int32"),
            "teacher_padding_mask": np.ones((B, P), "int32"),
            "teacher_positions": positions,
        },
    }


TEACHER_LOGITS = (3 * np.random.default_rng(5).standard_normal((V, V))).astype("float32")


def bigram_teacher(inputs):
    """Logits by the token before, whose use of the mask shows in them."""
    logits = ops.take(ops.convert_to_tensor(TEACHER_LOGITS), inputs["token_ids"], axis=0)
    return logits * ops.cast(ops.expand_dims(inputs["padding_mask"], -1), "float32")


def definition(hidden, table, weights, y, teacher_logits, temperature=1.0, hard_weight=0.0, top_k=V):
    """In float64, on logits; the teacher's beyond the `top_k` largest are one outcome."""
    logits = CAP * np.tanh(np.einsum("btd,vd->btv", hidden.astype("float64"), table.astype("float64")) / CAP)
    total = 0.0
    for b, t in np.ndindex(B, T):
        hard = -log_softmax(logits[b, t])[y["labels"][b, t]]
        position, loss = y["teacher_positions"][b, t], hard
        if position >= 0:
            log_q = log_softmax(teacher_logits[b, position].astype("float64") / temperature)
            log_p = log_softmax(logits[b, t] / temperature)
            order = np.argsort(-log_q)
            q, p = (
                np.append(np.exp(x)[order[:top_k]], [np.exp(x)[order[top_k:]].sum()] if top_k < V else [])
                for x in (log_q, log_p)
            )
            loss = hard_weight * hard + (1 - hard_weight) * temperature**2 * (q * np.log(q / p)).sum()
        total += weights[b, t] * loss
    return total / weights.sum()


def log_softmax(x):
    return x - np.log(np.exp(x).sum())


OPTIONS = {"teacher_alone": {}, "mixed_at_a_temperature": {"temperature": 2.5, "hard_weight": 0.3}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("top_k", [None, 5])
def test_value_and_gradients_are_those_of_the_definition(arrays, options, top_k, tmp_path):
    """Gradients by central differences of the definition in float64; in chunks of three tokens."""
    teacher_logits = np.asarray(TEACHER_LOGITS)[arrays["y"]["teacher_token_ids"]]
    loss, y = Distillation(bigram_teacher, **options), arrays["y"]
    if top_k:
        batch = {"a": np.zeros((B, 1), "int32")}, y, arrays["weights"]
        temperature = options.get("temperature", 1.0)
        data = grain.MapDataset.source([batch])
        stored = store_teacher_logits(data, bigram_teacher, tmp_path / "a", top_k=top_k, temperature=temperature)
        loss, (_, y, _) = Distillation(stored, **options), stored.batches()[0]
    exact = functools.partial(definition, teacher_logits=teacher_logits, **options, top_k=top_k or V)

    # What has no weight in the definition: any label of weight 0, and -100 whatever its weight.
    labels, weights = np.where(arrays["weights"] == 0, V + 3, y["labels"]), np.copy(arrays["weights"])
    labels[0, 2], weights[0, 2] = -100, 5.0

    def total(hidden, table, **kwargs):
        targets = {name: ops.convert_to_tensor(array) for name, array in {**y, "labels": labels}.items()}
        return loss.from_hidden_states(hidden, table, targets, weights, cap=CAP, chunk_bytes=4 * V * B * 3, **kwargs)[0]

    known = {"weights": arrays["weights"], "y": arrays["y"]}
    expected = exact(arrays["hidden"], arrays["table"], **known)
    tensors = [ops.convert_to_tensor(arrays[name]) for name in ("hidden", "table")]
    assert float(total(*tensors, training=False)) == pytest.approx(expected, rel=1e-5)
    assert float(total(*tensors, training=True)) == pytest.approx(expected, rel=1e-5)
    got = gradients(total, arrays["hidden"], arrays["table"])
    generator = np.random.default_rng(1)
    for name, gradient in zip(("hidden", "table"), got, strict=True):
        for _ in range(3):
            direction = generator.standard_normal(arrays[name].shape)
            ends = []
            for step in (1e-5, -1e-5):
                moved = {part: arrays[part].astype("float64") for part in ("hidden", "table")}
                moved[name] += step * direction
                ends.append(exact(**moved, **known))
            assert (gradient * direction).sum() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-5)


def test_token_that_the_teacher_rules_out_gives_no_nan(arrays):
    def teacher(inputs):
        return ops.where(ops.arange(V) < 3, -np.inf, bigram_teacher(inputs))

    def total(hidden, table):
        return Distillation(teacher).from_hidden_states(hidden, table, arrays["y"], arrays["weights"])[0]

    assert all(np.isfinite(gradient).all() for gradient in gradients(total, arrays["hidden"], arrays["table"]))


def plain_loss(lm, teacher, temperature, hard_weight):
    """The definition on both models' logits, over all target tokens of all batches."""
    total = tokens = 0.0
    for x, y, weights in batches():
        logits = lm.predict_on_batch(x).astype("float64")
        inputs = {"token_ids": y["teacher_token_ids"], "padding_mask": y["teacher_padding_mask"]}
        teacher_logits = teacher.predict_on_batch(inputs).astype("float64")
        for b, t in zip(*np.nonzero(weights), strict=True):
            log_p = log_softmax(logits[b, t])
            scaled = log_softmax(logits[b, t] / temperature)
            log_q = log_softmax(teacher_logits[b, y["teacher_positions"][b, t]] / temperature)
            soft = temperature**2 * (np.exp(log_q) * (log_q - scaled)).sum()
            total += hard_weight * -log_p[y["labels"][b, t]] + (1 - hard_weight) * soft
        tokens += weights.sum()
    return total / tokens


def test_gemma_teaches_in_fit_and_evaluate_and_is_left_as_it_was(monkeypatch):
    """In chunks of two positions; evaluated, trained, and evaluated by a plain computation before and after."""
    monkeypatch.setitem(CHUNK_BYTES, keras.config.backend(), 4 * 128 * 2 * 2)
    teacher = gemma()
    before, lm = values(teacher), student(Distillation(teacher, temperature=2.0, hard_weight=0.25))
    expected = plain_loss(lm, teacher, 2.0, 0.25)
    assert lm.evaluate(batches(), verbose=0, return_dict=True)["loss"] == pytest.approx(expected, rel=1e-4)
    history = lm.fit(batches(), epochs=3, validation_data=batches(), verbose=0).history
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    expected_after = plain_loss(lm, teacher, 2.0, 0.25)
    assert expected_after < expected - 0.1
    assert history["val_loss"][-1] == pytest.approx(expected_after, rel=1e-4)
    for now, then in zip(values(teacher), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_any_model_and_stored_logits_of_the_whole_vocabulary_teach_the_same(tmp_path):
    stored = store_teacher_logits(batches(), gemma(), tmp_path / "stored", top_k=1000, temperature=2.0)
    assert (stored.top_k, stored.vocabulary_size) == (128, 128)
    function = keras.Model(gemma().input, gemma().output)
    results = []
    for teacher, data in (
        (gemma(), batches()),
        (function, batches()),
        (StoredTeacher(stored.folder), stored.batches()),
    ):
        lm = student(Distillation(teacher, temperature=2.0, hard_weight=0.5))
        logs = [lm.train_on_batch(*batch, return_dict=True) for batch in data]
        results.append((logs, values(lm.backbone)))
    (expected_logs, expected_weights), *others = results
    for logs, weights in others:
        for found, expected in zip(logs, expected_logs, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        for found, expected in zip(weights, expected_weights, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
