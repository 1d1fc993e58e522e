"""What is drawn and how it is trained on: log-probabilities, one encoder pass, and the gradient of an update."""

import keras
import numpy as np
import pytest
from helpers.rewarded import ROWS, tiny_lm, weights_of
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

from keras_t5gemma.reinforcement.policy import Policy, answer_log_probs
from keras_t5gemma.reinforcement.policy_loss import PolicyLoss
from keras_t5gemma.reinforcement.reference import Reference
from keras_t5gemma.reinforcement.rollouts import Rollouts

B, N, NEW = 3, 4, 5
PROMPTS = [row["prompt"] for row in ROWS[:B]]


@pytest.fixture(scope="module")
def proto(tmp_path_factory):
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def lm(proto):
    return tiny_lm(proto)


@pytest.fixture(scope="module")
def rollout(lm):
    return Rollouts(lm, N, 1.0, NEW, 3)(PROMPTS, 1)


def tokens_of(rollout):
    """The tokens of each answer, R rows."""
    labels, weights = (x.reshape(B * N, -1) for x in (rollout.labels, rollout.weights))
    return [row[keep > 0].tolist() for row, keep in zip(labels, weights, strict=True)]


def test_rollout_has_the_answers_tokens_with_their_log_probs_as_score_gives_them(lm, rollout):
    rows = tokens_of(rollout)
    assert [len(row) for row in rows] == rollout.lengths.tolist()
    assert len(set(map(len, rows))) > 1  # some end on their own
    stops = {lm.preprocessor.tokenizer.end_token_id, lm.preprocessor.tokenizer.end_token2_id}
    assert [row[-1] in stops for row in rows] == rollout.has_ended.tolist()
    assert all(len(row) == NEW for row, ended in zip(rows, rollout.has_ended, strict=True) if not ended)
    inputs = lm.preprocessor.generate_preprocess(PROMPTS)
    groups = [rows[i * N : (i + 1) * N] for i in range(B)]
    without_texts = type(lm)(lm.backbone)
    expected = without_texts.score(_bos_only(inputs), groups)["log_probs"]
    found = rollout.log_probs.reshape(B, N, -1)[..., : expected.shape[2]]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    tokenizer = lm.preprocessor.tokenizer
    texts = [tokenizer.detokenize([i for i in row if i not in tokenizer.special_token_ids]) for row in rows]
    assert texts == rollout.texts


def _bos_only(inputs):
    return {name: x if name.startswith("encoder") else x[:, :1] for name, x in inputs.items()}


def test_seed_and_step_determine_the_draws_and_temperature_changes_them(lm, rollout):
    again = Rollouts(lm, N, 1.0, NEW, 3)
    assert tokens_of(again(PROMPTS, 1)) == tokens_of(rollout)
    assert tokens_of(again(PROMPTS, 2)) != tokens_of(rollout)
    cold = Rollouts(lm, N, 1e-4, NEW, 3)(PROMPTS, 1)
    assert cold.texts == [text for text in lm.generate(PROMPTS, max_new_tokens=NEW) for _ in range(N)]
    # At temperature 1, whatever the temperature of the draw.
    logits = answer_log_probs(lm, cold.inputs, cold.labels, training=False)
    found = ops.convert_to_numpy(logits) * cold.weights.reshape(B * N, -1)
    np.testing.assert_allclose(cold.log_probs.reshape(B * N, -1), found, atol=2e-4)


def test_update_encodes_each_prompt_once_and_gives_what_encoding_each_answers_prompt_gives(lm, rollout, monkeypatch):
    rows, encoder, run = [], lm.backbone.encoder, type(lm.backbone.encoder).call

    def counted(self, token_ids, *args, **kwargs):
        rows.append(token_ids.shape[0])
        return run(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(type(encoder), "call", counted)
    once = answer_log_probs(lm, rollout.inputs, rollout.labels, training=False)
    assert rows == [B]
    each = {name: np.repeat(x, N, axis=0) for name, x in rollout.inputs.items() if name.startswith("encoder")}
    each |= {name: x.reshape(B * N, 1, -1) for name, x in rollout.inputs.items() if name.startswith("decoder")}
    separately = answer_log_probs(lm, each, rollout.labels.reshape(B * N, 1, -1), training=False)
    assert rows == [B, B * N]
    np.testing.assert_allclose(ops.convert_to_numpy(once), ops.convert_to_numpy(separately), atol=1e-5)


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_steps_climb_the_rewarded_log_probs_by_their_gradient_in_one_part_or_two(proto, rollout, loss):
    # The change of the objective over a short step is the squared length of the step by the rate, if and only if the
    # step is the objective's whole gradient. A step in parts is the same step.
    rate, results = 1e-4, []
    advantages = np.random.default_rng(0).standard_normal((B, N))
    lengths = rollout.lengths.reshape(B, N)
    shares = 1 / lengths / lengths.size if loss == "grpo" else np.full((B, N), 1 / lengths.sum())

    def objective(lm):
        log_probs = ops.convert_to_numpy(answer_log_probs(lm, rollout.inputs, rollout.labels, training=False))
        sums = (log_probs.astype("float64").reshape(B, N, -1) * rollout.weights).sum(axis=2)
        return (advantages * shares * sums).sum()

    for parts in (1, 3):
        lm = tiny_lm(proto, optimizer=keras.optimizers.SGD(rate), accumulation_steps=parts)
        policy = Policy(lm, PolicyLoss(loss, 0.0, 0.9, None), lm.optimizer)
        for _ in range(2):  # the second time nothing of the first gradient is left
            before, start = objective(lm), weights_of(lm)
            logs = policy.update(rollout, advantages, rollout.weights)
            squares = sum(((x - y).astype("float64") ** 2).sum() for x, y in zip(weights_of(lm), start, strict=True))
            assert squares > 0
            np.testing.assert_allclose(objective(lm) - before, squares / rate, rtol=0.05)
        assert logs["clip_ratio/region_mean"] == 0
        results.append(weights_of(lm))
    for whole, in_parts in zip(*results, strict=True):
        np.testing.assert_allclose(whole, in_parts, atol=1e-6)


def test_reference_keeps_the_weights_at_the_start_and_with_lora_is_the_model_without_it(proto, rollout):
    for lora in (False, True):
        lm = tiny_lm(proto, lora=lora)
        reference = Reference(lm)
        before = reference.log_probs(rollout)
        found = before * rollout.weights
        np.testing.assert_allclose(found, rollout.log_probs, atol=2e-4)  # new adapters change nothing
        for variable in lm.trainable_variables:
            variable.assign(ops.convert_to_numpy(variable) + 0.1)
        np.testing.assert_array_equal(reference.log_probs(rollout), before)
        moved = ops.convert_to_numpy(answer_log_probs(lm, rollout.inputs, rollout.labels, training=False))
        assert np.abs(moved.reshape(before.shape) - before).max() > 0.01


def test_quantized_projection_gives_the_log_probs_of_score(proto, rollout):
    lm = tiny_lm(proto)
    lm.quantize("int8")
    assert lm.head.is_quantized
    found = ops.convert_to_numpy(answer_log_probs(lm, rollout.inputs, rollout.labels, training=False))
    rows = tokens_of(rollout)
    inputs = _bos_only(lm.preprocessor.generate_preprocess(PROMPTS))
    expected = type(lm)(lm.backbone).score(inputs, [rows[i * N : (i + 1) * N] for i in range(B)])["log_probs"]
    found = (found.reshape(rollout.weights.shape) * rollout.weights)[..., : expected.shape[2]]
    np.testing.assert_allclose(found, expected, atol=1e-3)
