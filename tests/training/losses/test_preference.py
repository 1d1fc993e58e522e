"""Training on preferences: what is computed, what it leads to, and what is refused."""

import keras
import numpy as np
import pytest
from helpers.one_step import weights_of
from helpers.peers import tiny_config
from helpers.preferred import answer_inputs, rows, write_preset
from helpers.tiny import loud_backbone
from keras import ops

import keras_t5gemma as kt
from keras_t5gemma.kernels.cross_entropy.chunks import CHUNK_BYTES
from keras_t5gemma.training.losses.answers import AnswerMeans, answer_hidden_states, answer_log_probs, repeated

NAMES = ["logps/chosen", "logps/rejected", "loss"]
NAMES += ["rewards/accuracies", "rewards/chosen", "rewards/margins", "rewards/rejected"]
BACKEND = keras.backend.backend()
TRAIN, HELD_OUT = list(rows(range(40))), list(rows(range(40, 72)))


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return write_preset(tmp_path_factory.mktemp("models") / "preset")


def data(lm, examples=HELD_OUT, **options):
    return kt.preference_dataset(examples, lm.preprocessor, **{"batch_size": 8, "num_epochs": 1, **options})


def evaluated(lm, batches):
    return lm.evaluate(batches, verbose=0, return_dict=True)


def loaded(preset, lora=0, noise=0.0, **kwargs):
    keras.utils.set_random_seed(0)
    lm = kt.T5GemmaSeq2SeqLM.from_preset(preset, **kwargs)
    if lora:
        lm.backbone.enable_lora(lora)
        for variable in lm.backbone.trainable_variables if noise else ():
            variable.assign(noise * np.random.default_rng(1).standard_normal(tuple(variable.shape)))
    return lm


def tensors(x, labels):
    return {name: ops.convert_to_tensor(value) for name, value in x.items()}, ops.convert_to_tensor(labels)


def test_prompt_that_is_encoded_once_gives_what_encoding_it_for_each_answer_gives():
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(balanced=False, num_layers=1)))
    x, _ = tensors(*answer_inputs(128))
    found = ops.convert_to_numpy(answer_hidden_states(lm, x, training=False))
    assert found.shape == (6, 7, 32)
    # The encoder runs again for the second answer.
    mask = x["encoder_padding_mask"]
    outputs = [lm.backbone.encoder(x["encoder_token_ids"], mask, training=False) for _ in range(2)]
    outputs = ops.reshape(ops.stack(outputs, axis=1), (6, 9, -1))
    flat = {name: ops.reshape(x[name], (6, 7)) for name in ("decoder_token_ids", "decoder_padding_mask")}
    twice = lm.backbone.decoder(*flat.values(), outputs, repeated(mask, 2), training=False)
    np.testing.assert_array_equal(found, ops.convert_to_numpy(twice))
    flat |= {name: repeated(x[name], 2) for name in ("encoder_token_ids", "encoder_padding_mask")}
    as_rows = ops.convert_to_numpy(lm.hidden_states(flat, training=False))
    np.testing.assert_allclose(found, as_rows, atol=2e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1


@pytest.mark.skipif(BACKEND != "jax", reason="JAX shows every intermediate of a program")
def test_program_has_no_logits_of_all_tokens(monkeypatch):
    import jax

    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(balanced=False, num_layers=1)))
    monkeypatch.setitem(CHUNK_BYTES, "jax", 4 * 128 * 12)  # two of seven positions at a time
    lm.compile(loss=kt.PreferenceLoss("orpo"))
    x, labels = tensors(*answer_inputs(128))
    trainable, rest = ([v.value for v in group] for group in (lm.trainable_variables, lm.non_trainable_variables))

    def loss(trainable):
        frozen = zip(lm.non_trainable_variables, rest, strict=True)
        with keras.StatelessScope([*zip(lm.trainable_variables, trainable, strict=True), *frozen]):
            return lm.loss.of_batch(lm, x, {"labels": labels}, ops.ones((3,)), training=True)[0]

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars if 128 in variable.aval.shape[-1:])
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else [value]:
                    if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                        yield from sizes(getattr(inner, "jaxpr", inner))

    found = max(sizes(jax.make_jaxpr(jax.value_and_grad(loss))(trainable).jaxpr))
    assert 128 * 6 <= found <= 128 * 12 < 128 * 3 * 2 * 7


def test_dpo_with_a_stored_reference_prefers_what_it_should_of_prompts_it_has_not_seen(preset, tmp_path):
    lm = loaded(preset)
    reference = kt.reference_log_probs(lm, data(lm, TRAIN + HELD_OUT), tmp_path / "reference")
    lm.compile(optimizer=keras.optimizers.Adam(3e-3), loss=kt.PreferenceLoss("dpo"))
    before = evaluated(lm, reference.join(data(lm)))
    assert sorted(before) == NAMES
    assert before["loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert before["rewards/margins"] == pytest.approx(0, abs=1e-2)
    history = lm.fit(reference.join(data(lm, TRAIN, num_epochs=None)), steps_per_epoch=30, verbose=0).history
    assert sorted(history) == NAMES
    after = evaluated(lm, reference.join(data(lm)))
    assert after["rewards/accuracies"] >= 0.95
    assert after["rewards/margins"] > 2
    assert after["rewards/margins"] == pytest.approx(after["rewards/chosen"] - after["rewards/rejected"], rel=1e-4)
    answers = [[row["chosen"], row["rejected"]] for row in HELD_OUT]
    scores = lm.score([row["prompt"] for row in HELD_OUT], answers)["log_likelihood"].mean(axis=0)
    assert [after["logps/chosen"], after["logps/rejected"]] == pytest.approx(scores, rel=1e-4)


def test_dpo_of_lora_on_bfloat16_needs_no_second_model(preset):
    lm = loaded(preset, lora=4, dtype="bfloat16")
    frozen = {path: value for path, value in weights_of(lm).items() if "lora" not in path}
    loss = kt.PreferenceLoss("dpo", reference="lora_off")
    optimizer = kt.optimizer("adamw", learning_rate=3e-2, steps=40, warmup_steps=0)
    lm.compile(optimizer=optimizer, loss=loss, accumulation_steps=2)
    lm.backbone.rematerialize = True
    assert evaluated(lm, data(lm))["rewards/margins"] == 0
    lm.fit(data(lm, TRAIN, num_epochs=None), steps_per_epoch=20, verbose=0)
    after = evaluated(lm, data(lm))
    assert after["rewards/accuracies"] >= 0.95
    assert after["rewards/margins"] > 0.5
    for path, value in frozen.items():
        np.testing.assert_array_equal(value, weights_of(lm)[path])


def test_model_without_its_lora_is_the_reference_that_the_base_gives(preset, tmp_path):
    base = loaded(preset)
    reference = kt.reference_log_probs(base, data(base), tmp_path / "reference")
    lm = loaded(preset, lora=2, noise=0.5)
    lm.compile(loss=kt.PreferenceLoss("ipo", reference="lora_off"))
    found = evaluated(lm, data(lm))
    lm.compile(loss=kt.PreferenceLoss("ipo"))
    expected = evaluated(lm, reference.join(data(lm)))
    assert abs(expected["rewards/chosen"]) > 0.05
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_step_in_parts_is_that_of_the_whole_batch(preset):
    steps = []
    for options in ({}, {"accumulation_steps": 4}):
        lm = loaded(preset)
        lm.compile(optimizer=keras.optimizers.SGD(0.1), loss=kt.PreferenceLoss("cpo"), **options)
        ((x, y, _),) = data(lm, HELD_OUT[:8], shuffle=False)
        weights = np.array([1, 0, 2, 1, 3, 1, 1, 0], "float32")
        logs = lm.train_on_batch(x, y, weights, return_dict=True)
        steps.append(({name: float(value) for name, value in logs.items()}, weights_of(lm)))
    (logs, trained), (logs_in_parts, trained_in_parts) = steps
    assert logs_in_parts == pytest.approx(logs, rel=1e-4)
    for path, value in trained.items():
        np.testing.assert_allclose(trained_in_parts[path], value, atol=1e-5, err_msg=path)


def test_kto_raises_desirable_answers_and_lowers_others(preset):
    unpaired = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in TRAIN[:16]
        for name in ("chosen", "rejected")
    ]
    lm = loaded(preset, lora=4)
    lm.compile(optimizer=keras.optimizers.Adam(2e-2), loss=kt.PreferenceLoss("kto", reference="lora_off"))
    before = evaluated(lm, data(lm, unpaired))
    lm.fit(data(lm, unpaired, num_epochs=None), steps_per_epoch=15, verbose=0)
    after = evaluated(lm, data(lm, unpaired))
    assert set(after) == {*NAMES, "kl"} - {"rewards/accuracies"}
    assert after["rewards/margins"] > 0.3
    assert after["rewards/margins"] == pytest.approx(after["rewards/chosen"] - after["rewards/rejected"], abs=1e-5)
    gain = [after[name] - before[name] for name in ("logps/chosen", "logps/rejected")]
    assert gain[0] > gain[1] + 3


def test_run_that_is_stopped_goes_on_to_the_same_weights(preset, tmp_path):
    def trained(folder, steps):
        lm, loss = loaded(preset, lora=2), kt.PreferenceLoss("hinge", reference="lora_off")
        lm.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
        checkpoint = kt.TrainingCheckpoint(tmp_path / folder, save_every=2)
        source = checkpoint.data(data(lm, TRAIN, num_epochs=None))
        lm.fit(source, epochs=steps // 2, steps_per_epoch=2, verbose=0, callbacks=[checkpoint])
        return weights_of(lm)

    whole = trained("whole", 4)
    trained("stopped", 2)
    for path, value in trained("stopped", 4).items():
        np.testing.assert_allclose(value, whole[path], rtol=0, atol=0 if BACKEND == "jax" else 1e-6)


def test_invalid_batch_or_model_is_named(preset):
    lm = loaded(preset)
    lm.compile(loss=kt.PreferenceLoss("dpo"))
    with pytest.raises(ValueError, match=r"which the batches lack\. Compute them once"):
        evaluated(lm, data(lm))
    with pytest.raises(ValueError, match=r"`PreferenceLoss` takes batches .* such as `preference_dataset` makes"):
        evaluated(lm, kt.supervised_dataset([("a", "b")] * 8, lm.preprocessor, batch_size=8, num_epochs=1))
    unpaired = [{"prompt": f"a {i}", "completion": "b", "label": True} for i in range(8)]
    with pytest.raises(
        ValueError, match=r"kind='dpo' needs .* chosen and rejected\. .* single answers, which are for .*'kto'"
    ):
        evaluated(lm, data(lm, unpaired))
    lm.compile(loss=kt.PreferenceLoss("dpo", reference="lora_off"), run_eagerly=True)
    with pytest.raises(ValueError, match="without its LoRA, and the model has none"):
        evaluated(lm, data(lm))
    lm.compile(loss=kt.PreferenceLoss("orpo"))
    ((x, y, weights),) = data(lm, HELD_OUT[:8])
    for changed, message in (
        (({**x, "decoder_token_ids": x["decoder_token_ids"] + 600}, y, weights), "`decoder_token_ids` must be in"),
        ((x, {"labels": y["labels"][:, :, 1:]}, weights), "Received: shapes"),
        ((x, y, weights[1:]), "`sample_weight` must be"),
        ((x, {**y, "reference_log_probs": np.zeros((8, 2))}, weights), "which the loss would not read"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.test_on_batch(*changed)
    with pytest.raises(ValueError, match="makes no logits for metrics of your own"):
        lm.compile(loss=kt.PreferenceLoss("orpo"), weighted_metrics=["accuracy"])
    with pytest.raises(ValueError, match="is a loss of whole answers, not of logits"):
        kt.PreferenceLoss("orpo")(np.zeros((1, 2)), np.zeros((1, 2, 5)))


def test_compiled_model_is_saved_with_its_loss(preset, tmp_path):
    lm = loaded(preset)
    lm.compile(loss=kt.PreferenceLoss("simpo", beta=2.0, gamma=1.0))
    lm.save(tmp_path / "lm.keras")
    again = keras.saving.load_model(tmp_path / "lm.keras")
    assert isinstance(again._chunked, AnswerMeans)
    assert (again.loss.kind, again.loss.beta, again.loss.options["gamma"]) == ("simpo", 2.0, 1.0)


def test_quantized_embedding_is_refused():
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(balanced=False, num_layers=1)))
    lm.quantize("int8")
    x, labels = tensors(*answer_inputs(128))
    with pytest.raises(ValueError, match="embedding that is not quantized"):
        answer_log_probs(lm, x, labels, training=True)
