"""`reinforce`: its options, what it leaves alone, its errors, and runs that are stopped and resumed."""

import threading

import keras
import numpy as np
import pytest
from helpers.rewarded import LONGEST, ROWS, tiny_lm, weights_of, wished
from helpers.tiny_tokenizer import train_tiny_tokenizer

import keras_t5gemma as kt
from keras_t5gemma._keras_internals import variable_array
from keras_t5gemma.training.callbacks.log_file import read_log

RUN = {"batch_size": 2, "num_samples": 4, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def proto(tmp_path_factory):
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def baseline(proto):
    """`(history, weights)` of two plain steps."""
    lm = tiny_lm(proto)
    history = kt.reinforce(lm, ROWS, wished, steps=2, **RUN)
    return history, weights_of(lm)


def judge(completions):
    return [float(len(text)) for text in completions]


def differ(weights, others):
    return any(np.any(x != y) for x, y in zip(weights, others, strict=True))


def test_history_has_trls_names_and_what_they_say(proto):
    lm, seen, rows = tiny_lm(proto), [], []

    def wish(completions, **columns):
        seen.append((completions, columns))
        return wished(completions, columns["wish"])

    def short(prompts, completions):
        return [np.float32(-len(text)) for text in completions]

    options = {
        "reward_weights": [2.0, 0.5],
        "beta": 0.04,
        "updates_per_rollout": 2,
        "epsilon": 1e-6,
        "epsilon_high": 1e9,
    }
    history = kt.reinforce(lm, ROWS, [wish, short], steps=2, on_step=rows.append, **RUN, **options)
    assert {name: [row[name] for row in rows] for name in rows[0]} == history
    assert history["step"] == [1, 2]
    completions, columns = seen[0]
    assert len(completions) == 8
    by_prompt = {row["prompt"]: row["wish"] for row in ROWS}
    assert [by_prompt[prompt] for prompt in columns["prompts"]] == columns["wish"]
    assert columns["prompts"] == [prompt for prompt in columns["prompts"][::4] for _ in range(4)]
    wishes, lengths = wished(completions, columns["wish"]), [-len(text) for text in completions]
    rewards = 2 * np.array(wishes) + 0.5 * np.array(lengths)
    expected = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(ddof=1),
        "rewards/wish/mean": np.mean(wishes),
        "rewards/short/mean": np.mean(lengths),
        "frac_reward_zero_std": np.mean([len(set(group)) == 1 for group in rewards.reshape(2, 4).tolist()]),
    }
    assert {name: history[name][0] for name in expected} == pytest.approx(expected)
    assert 1 < history["completions/mean_length"][0] < 5
    assert 0 < history["completions/clipped_ratio"][0] < 1
    # The second update of a step is off its rollout, and the second step away from the start.
    assert history["clip_ratio/low_mean"][0] > 0
    assert history["clip_ratio/high_mean"] == [0, 0]
    assert history["clip_ratio/region_mean"] == history["clip_ratio/low_mean"]
    assert min(history["kl"]) > 0


# The other options have tests of their own.
@pytest.mark.parametrize("options", [{"seed": 1}, {"loss": "dapo"}, {"temperature": 0.5}, {"beta": 1.0}], ids=str)
def test_option_changes_the_weights_that_training_ends_with(proto, baseline, options):
    lm = tiny_lm(proto)
    history = kt.reinforce(lm, ROWS, wished, steps=2, **RUN, **options)
    assert differ(weights_of(lm), baseline[1])
    assert ("kl" in history) == ("beta" in options)


def test_the_same_call_gives_the_same_weights_and_leaves_sampler_and_a_rate_of_its_own_alone(proto, baseline):
    sampler = kt.TopKTopPSampler(k=3, seed=5)
    lm = tiny_lm(proto, sampler=sampler)
    state, iterations = variable_array(sampler.variables[0]).copy(), int(lm.optimizer.iterations)
    history = kt.reinforce(lm, ROWS, wished, steps=2, **RUN)
    assert {name: pytest.approx(values, rel=1e-4, abs=1e-6) for name, values in baseline[0].items()} == history
    for weight, expected in zip(weights_of(lm), baseline[1], strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-6)
    assert lm.sampler is sampler
    np.testing.assert_array_equal(variable_array(sampler.variables[0]), state)
    assert int(lm.optimizer.iterations) == iterations + 2
    optimizer = lm.optimizer
    kt.reinforce(lm, ROWS, wished, steps=1, learning_rate=1e-3, **RUN)
    assert lm.optimizer is optimizer
    assert int(optimizer.iterations) == iterations + 2


def test_answers_that_were_cut_are_left_out_of_the_update_if_asked(proto):
    lm = tiny_lm(proto, louder=0)
    before = weights_of(lm)
    for masks in (True, False):
        history = kt.reinforce(lm, ROWS, wished, steps=1, mask_truncated_completions=masks, **RUN)
        assert history["completions/clipped_ratio"] == [1.0]
        assert differ(weights_of(lm), before) is not masks


def test_lora_in_bfloat16_moves_adapters_alone_and_measures_kl_from_them(proto):
    lm = tiny_lm(proto, lora=True, dtype="bfloat16", optimizer=kt.optimizer(learning_rate=0.1, warmup_steps=0))
    frozen = [keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")) for x in lm.non_trainable_variables]
    before = weights_of(lm)
    history = kt.reinforce(lm, ROWS, wished, steps=3, beta=0.04, **RUN)
    assert history["kl"][0] < 1e-3 < history["kl"][-1]
    assert differ(weights_of(lm), before)
    for variable, value in zip(lm.non_trainable_variables, frozen, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")), value)


def test_run_that_a_reward_function_stops_resumes_to_the_bit(proto, tmp_path):
    options = {"steps": 4, "save_every": 1, "beta": 0.1, **RUN}

    def noisy(completions, wish):
        return np.array(wished(completions, wish)) + np.random.random(len(wish))

    def failing(completions, wish):
        if len(rows) == 2:
            raise OSError("the judge is away")
        return noisy(completions, wish)

    failing.__name__ = "noisy"

    def trained(folder, function, **more):
        keras.utils.set_random_seed(7)
        lm = tiny_lm(proto, optimizer=keras.optimizers.Adam(0.01))
        np.random.seed(3)
        kt.reinforce(lm, ROWS, function, folder=folder, **{**options, **more})
        return lm

    whole = trained(tmp_path / "whole", noisy)
    rows = []
    with pytest.raises(RuntimeError, match=r"`noisy` raised OSError: the judge is away.*step 3"):
        trained(tmp_path / "stopped", failing, on_step=rows.append)
    assert len(read_log(tmp_path / "stopped")["reward"][0]) == 2
    resumed = trained(tmp_path / "stopped", noisy)
    close = np.testing.assert_array_equal if keras.config.backend() == "jax" else np.testing.assert_allclose
    limits = {} if keras.config.backend() == "jax" else {"rtol": 1e-4, "atol": 1e-6}
    for weight, expected in zip(weights_of(resumed), weights_of(whole), strict=True):
        close(weight, expected, **limits)
    logs = [read_log(tmp_path / name) for name in ("whole", "stopped")]
    assert logs[1].keys() == logs[0].keys() > {"loss", "reward", "kl", "completions/mean_length"}
    for name, (steps, values) in logs[0].items():
        assert logs[1][name][0] == steps == [1, 2, 3, 4]
        np.testing.assert_allclose(logs[1][name][1], values, rtol=1e-4, atol=1e-6)
    # The folder is that of any run.
    fresh = tiny_lm(proto)
    kt.load_training_weights(fresh, tmp_path / "whole")
    assert not differ(weights_of(fresh), weights_of(whole))
    assert kt.T5GemmaSeq2SeqLM.from_preset(kt.training_weights(tmp_path / "whole", last=1)[0]).preprocessor
    with pytest.warns(UserWarning, match="has made its 4 steps"):
        trained(tmp_path / "whole", noisy)
    with pytest.raises(ValueError, match=r"`beta` was 0.1 in the run of .*step_00000004, and is 0.2"):
        trained(tmp_path / "whole", noisy, beta=0.2, steps=5)


def test_reward_function_may_generate_and_another_thread_may_not(proto):
    lm, said, answers = tiny_lm(proto), [], []

    def ask():
        with pytest.raises(RuntimeError, match="cannot run while another thread is in `reinforce`") as error:
            lm.generate("The", max_new_tokens=2)
        said.append(str(error.value))

    def judge(completions):
        answers.append(lm.generate("The", max_new_tokens=2))
        other = threading.Thread(target=ask)
        other.start()
        other.join()
        return range(len(completions))

    before = lm.generate("The", max_new_tokens=2)
    kt.reinforce(lm, ROWS, judge, steps=1, **RUN)
    assert answers == [before]
    assert "a reward function of that `reinforce`" in said[0]
    assert isinstance(lm.generate("The", max_new_tokens=2), str)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: [0.0] * 7 + [float("nan")], r"one finite number .* step 1 it returned nan for row 7"),
        (lambda completions: [0.0] * 3 + [None] * 5, "it returned None for row 3"),
        (lambda completions: ["good"] * 8, "it returned 'good' for row 0"),
        (lambda completions: [1.0] * 4, "8 in all. In step 1 it returned 4"),
        (lambda completions: 1.0, "it returned 1.0"),
        (lambda completions, truth: [1.0] * 8, "needs `truth`, which is not a column .* prompts, wish"),
    ],
)
def test_bad_reward_is_an_error_that_names_function_and_row_and_changes_nothing(shared, function, message):
    function.__name__ = "judge"
    before = weights_of(shared)
    with pytest.raises(ValueError, match=f"`judge` .*{message}"):
        kt.reinforce(shared, ROWS, function, steps=1, **RUN)
    assert not differ(weights_of(shared), before)


@pytest.fixture(scope="module")
def shared(proto):
    return tiny_lm(proto)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "`steps`"),
        ({"num_samples": 1}, "`num_samples` must be an integer of at least 2"),
        ({"temperature": 0}, "`temperature`"),
        ({"learning_rate": -1.0}, "`learning_rate`"),
        ({"loss": "ppo"}, "`loss`"),
        ({"reward_weights": [1, 2]}, "`reward_weights` must have one finite number per reward function, 1"),
        ({"rewards": "judge"}, "`rewards` must be a function"),
        ({"prompts": "Why?"}, "`prompts` must be a list"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [{"prompt": "a", "x": 1}, {"prompt": "b"}]}, "row 1: prompt"),
        ({"prompts": [{"prompt": "a", "completions": 1}]}, "'completions'"),
        ({"prompts": ["a", "b", "a b " * 40]}, r"Row 2 of `prompts`, 'a b a b .*takes \d+ tokens"),
    ],
)
def test_invalid_argument_is_an_error_that_names_it(shared, arguments, message):
    given = {"prompts": ["Why?"], "rewards": judge, "steps": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        kt.reinforce(shared, given.pop("prompts"), given.pop("rewards"), **given)


def test_model_that_cannot_be_trained_is_an_error_that_says_why(shared):
    bare = kt.T5GemmaSeq2SeqLM(shared.backbone)
    with pytest.raises(ValueError, match="`preprocessor`"):
        kt.reinforce(bare, ["Why?"], judge, steps=1)
    uncompiled = kt.T5GemmaSeq2SeqLM(shared.backbone, shared.preprocessor, compile=False)
    with pytest.raises(ValueError, match="not compiled"):
        kt.reinforce(uncompiled, ["Why?"], judge, steps=1)
    with pytest.raises(ValueError, match=r"must be a T5GemmaSeq2SeqLM.*Received: a T5GemmaTextClassifier"):
        kt.reinforce(kt.T5GemmaTextClassifier(shared.backbone, 2), ["Why?"], judge, steps=1)


def test_conversations_are_prompts_of_a_preprocessor_for_chats(shared):
    chats = [[{"role": "user", "content": "Why?"}], [{"role": "user", "content": "Who?"}]]
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(shared.preprocessor.tokenizer, 24, LONGEST[1], chat=True)
    lm, seen = kt.T5GemmaSeq2SeqLM(shared.backbone, preprocessor), []

    def judge(prompts, completions):
        seen.extend(prompts)
        return [0.0] * len(completions)

    with pytest.warns(UserWarning, match="In none of 1 steps did two answers"):
        history = kt.reinforce(lm, chats, judge, steps=1, learning_rate=1e-9, **RUN)
    assert sorted(chat[0]["content"] for chat in seen) == ["Who?"] * 4 + ["Why?"] * 4
    assert history["frac_reward_zero_std"] == [1.0]
