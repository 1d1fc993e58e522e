"""`reinforce`: a model learns from rewards for the answers that it draws."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import keras

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checks import integer, is_number
from keras_t5gemma.concurrency import changing
from keras_t5gemma.progress import text_progress
from keras_t5gemma.reinforcement.advantages import group_advantages, have_equal_rewards
from keras_t5gemma.reinforcement.policy import Policy
from keras_t5gemma.reinforcement.policy_loss import PolicyLoss
from keras_t5gemma.reinforcement.prompts import PROMPT, Prompts
from keras_t5gemma.reinforcement.reference import Reference
from keras_t5gemma.reinforcement.rewards import Rewards
from keras_t5gemma.reinforcement.rollouts import Rollout, Rollouts
from keras_t5gemma.reinforcement.run_folder import RunFolder
from keras_t5gemma.training.optimizers.checks import check_optimizer
from keras_t5gemma.training.optimizers.factory import optimizer as new_optimizer

# Steps after which a run in which nothing was learned is reported.
_STEPS_TO_JUDGE = 10


def reinforce(
    lm,
    prompts: Iterable,
    rewards: Callable | Sequence[Callable],
    *,
    steps: int,
    batch_size: int = 8,
    num_samples: int = 8,
    reward_weights: Sequence[float] | None = None,
    loss: str = "grpo",
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    mask_truncated_completions: bool = False,
    updates_per_rollout: int = 1,
    learning_rate: float | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    save_every: int = 100,
    keep: int | None = 3,
    on_step: Callable[[dict[str, float]], object] | None = None,
) -> dict[str, list[float]]:
    """Trains a model on rewards for its own answers: GRPO (arXiv 2402.03300), with the options of DAPO.

        def is_right(completions, answer):
            return [completion == truth for completion, truth in zip(completions, answer)]

        rows = [{"prompt": "2 + 2 =", "answer": "4"}, ...]
        kt.reinforce(lm, rows, is_right, steps=200, learning_rate=1e-6)

    In a step the model draws `num_samples` answers to each of `batch_size` prompts, the reward functions judge them,
    and the optimizer makes answers likelier that were better than the other answers to their prompt. Each prompt is
    encoded once, in drawing and in the update. Prompts are read in a random order, again and again.

    Log-probabilities are the model's own, as `score` returns them, both of the drawn tokens and in the update.
    `temperature` changes only what is drawn: at a temperature other than 1 the answers are not drawn from the
    distribution that is trained, and the ratios do not correct this. An answer consists of the drawn tokens with the
    one that ended it. If it was cut at `max_new_tokens`, it has no end to learn from. Dropout is on in updates only.

    Args:
        lm: a compiled `T5GemmaSeq2SeqLM` with a preprocessor, with or without LoRA. Its sampler is not used and not
            changed. An update runs in the parts of its `accumulation_steps`.
        prompts: strings; conversations, if the preprocessor is for chats; or rows `{"prompt": ..., **columns}`.
        rewards: a function, or a list of functions whose results are added. Each is called once per step, by keyword,
            with `completions`, a list of strings, `prompts` and the prompts' columns, repeated per answer: all of them
            if it has `**columns`, else those that it names. It returns one finite number or bool per answer. It may
            call `lm.generate` or `lm.score`.
        steps: the number of steps in all, those of a resumed run included.
        batch_size: B, prompts per step.
        num_samples: n, answers per prompt; at least 2.
        reward_weights: one number per function; 1 for each if None.
        loss: "grpo" for the mean over answers of their means over tokens, "dapo" for the mean over all tokens.
        beta: weight of the Kullback-Leibler divergence from the weights at the start. They are kept as a copy of the
            trainable weights, which with LoRA are the adapters alone. 0 for no reference and no copy; 0.04 is the
            paper's.
        epsilon: the ratio of a token's probability to that when it was drawn is followed down to 1 - epsilon.
        epsilon_high: and up to 1 + epsilon_high; as `epsilon` if None. DAPO's is 0.28.
        temperature: logits are divided by it before a token is drawn.
        max_new_tokens: the most tokens of an answer; if None, as many as the preprocessor's `decoder_sequence_length`
            allows.
        mask_truncated_completions: whether answers that were cut at `max_new_tokens` are left out of the update (DAPO's
            overlong filtering). They count in their group's mean either way.
        updates_per_rollout: optimizer steps on the same answers. Ratios matter, and clip, from the second on.
        learning_rate: None for the optimizer that the model was compiled with, whose state continues. A number for a
            new AdamW with this constant rate, used in this call only.
        seed: determines the order of the prompts and all draws.
        folder: where to save states and `log.csv`; None for nowhere. To resume a stopped run, start the same program
            again: it ends with the weights of a run that was never stopped, bit-exactly on JAX, and as equal as two
            runs are on TensorFlow and PyTorch. `load_training_weights` and `training_weights` read the folder.
        save_every: steps between two saved states; the last step is saved too.
        keep: the number of newest states to keep; None for all.
        on_step: called after each step with its row of the history, e.g. to print it; or None.

    Returns:
        `{name: values}`, one value per step of this call, under TRL's names: `loss`, `reward`, `reward_std`,
        `rewards/<function>/mean`, `frac_reward_zero_std` (prompts whose answers all have the same reward, which teach
        nothing), `kl` if there is a `beta`, `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean`,
        `completions/mean_length` in tokens, `completions/clipped_ratio`; and the `step`.

    Raises:
        ValueError: if an argument is invalid, the model is not compiled, has no preprocessor or no trainable weights,
            the folder is of a run with other arguments, or a reward function does not return one finite number per
            answer.
        RuntimeError: if a reward function raises an exception, or another thread is in `fit`.
        FloatingPointError: if the loss is not finite.
        CheckpointError: if the newest state in the folder is damaged or of another model.
        MemoryError: if memory does not suffice for drawing.
    """
    steps, batch_size = integer(steps, "steps"), integer(batch_size, "batch_size")
    num_samples = integer(num_samples, "num_samples", least=2)
    updates = integer(updates_per_rollout, "updates_per_rollout")
    save_every, keep = integer(save_every, "save_every"), integer(keep, "keep", optional=True, none_means="for all")
    seed = integer(seed, "seed", least=0)
    max_new_tokens = integer(max_new_tokens, "max_new_tokens", optional=True)
    _check_model(lm, learning_rate)
    max_new_tokens = max_new_tokens or lm.preprocessor.decoder_sequence_length - 1
    policy_loss = PolicyLoss(loss, beta, epsilon, epsilon_high)
    rows = Prompts(prompts, batch_size, seed)
    if lm.preprocessor.truncate is None:  # else the steps cut prompts, and say how many
        rows.check(lm.preprocessor.generate_preprocess)
    functions = Rewards(rewards, reward_weights, rows.columns)
    options = {
        "prompts": rows.checksum(),
        "reward functions": functions.names,
        "reward_weights": functions.weights,
        "batch_size": batch_size,
        "num_samples": num_samples,
        "loss": loss,
        "beta": beta,
        "epsilon": policy_loss.epsilon,
        "epsilon_high": policy_loss.epsilon_high,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "mask_truncated_completions": bool(mask_truncated_completions),
        "updates_per_rollout": updates,
        "seed": seed,
    }
    with changing(lm, "reinforce"):
        policy = Policy(lm, policy_loss, _optimizer(lm, learning_rate))
        rollouts = Rollouts(lm, num_samples, temperature, max_new_tokens, seed)
        reference = Reference(lm) if beta else None
        run = None
        if folder is not None:
            run = RunFolder(folder, policy, reference, options, save_every=save_every, keep=keep)
        start, history = (0 if run is None else run.step), {}
        if start >= steps:
            warn_caller(f"The run in {folder} has made its {start} steps; more `steps` continue it.")
            return history
        with text_progress("Learning from rewards", steps) as advance:
            advance(start)
            for step in range(start + 1, steps + 1):
                batch = rows.batch(step)
                rollout = rollouts([row[PROMPT] for row in batch], step)
                values, judged = _judge(functions, rollout, batch, num_samples, step)
                weights = rollout.weights
                if mask_truncated_completions:
                    weights = weights * rollout.has_ended.reshape(*weights.shape[:2], 1)
                log_probs = None if reference is None else reference.log_probs(rollout)
                for _ in range(updates):
                    logs = policy.update(rollout, group_advantages(values), weights, log_probs)
                if not math.isfinite(logs["loss"]):
                    raise FloatingPointError(
                        f"The loss is {logs['loss']} in step {step}.{'' if run is None else ' ' + run.last_good()}"
                    )
                row = {"loss": logs.pop("loss"), **judged, **logs}
                if run is not None:
                    run.after_step(step, row, is_last=step == steps)
                for name, value in {"step": step, **row}.items():
                    history.setdefault(name, []).append(value)
                if step - start == min(_STEPS_TO_JUDGE, steps - start):
                    _warn_of_equal_rewards(history)
                if on_step is not None:
                    on_step({"step": step, **row})
                advance(1)
    return history


def _warn_of_equal_rewards(history: dict[str, list[float]]) -> None:
    """Warns if no step so far had answers to a prompt with different rewards."""
    if min(history["frac_reward_zero_std"]) == 1:
        warn_caller(
            f"In none of {len(history['step'])} steps did two answers to a prompt get different rewards, so nothing "
            f"was learned; the mean reward is {history['reward'][-1]:g}. Draw more varied answers (`temperature`, "
            f"`num_samples`), fine-tune on examples first, or give partial rewards."
        )


def _judge(functions: Rewards, rollout: Rollout, batch: list[dict], num_samples: int, step: int):
    """The rewards of a rollout.

    Args:
        functions: the reward functions.
        rollout: the answers.
        batch: the rows of their prompts.
        num_samples: n.
        step: the step, for errors.

    Returns:
        `(rewards, row)`: float64 [B, n], and the numbers of the step that are known before the update.
    """
    repeated = [row for row in batch for _ in range(num_samples)]
    columns = {name: [row[name] for row in repeated] for name in batch[0] if name != PROMPT}
    columns["prompts"] = [row[PROMPT] for row in repeated]
    rewards, by_function = functions(rollout.texts, columns, step)
    groups = rewards.reshape(-1, num_samples)
    return groups, {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(ddof=1)),
        "frac_reward_zero_std": float(have_equal_rewards(groups).mean()),
        **{f"rewards/{name}/mean": float(values.mean()) for name, values in by_function.items()},
        "completions/mean_length": float(rollout.lengths.mean()),
        "completions/clipped_ratio": float(1 - rollout.has_ended.mean()),
    }


def _check_model(lm, learning_rate: float | None) -> None:
    """Checks that a model can draw answers and be trained."""
    if not callable(getattr(lm, "generate", None)):
        raise ValueError(f"`lm` must be a T5GemmaSeq2SeqLM, which draws answers. Received: a {type(lm).__name__}.")
    if lm.preprocessor is None:
        raise ValueError("`lm` must have a `preprocessor`: reward functions read texts.")
    if not lm.compiled:
        raise ValueError("`lm` is not compiled. Call `lm.compile(...)` first.")
    if learning_rate is not None and not (is_number(learning_rate) and learning_rate > 0):
        raise ValueError(f"`learning_rate` must be positive, or None. Received: learning_rate={learning_rate!r}.")
    if learning_rate is None and lm.optimizer is None:
        raise ValueError("`lm` was compiled without an optimizer. Compile it with one, or pass a `learning_rate`.")


def _optimizer(lm, learning_rate: float | None) -> keras.optimizers.Optimizer:
    """The model's optimizer, or a new one with a rate, built for the trainable weights.

    Raises:
        ValueError: if it cannot train the weights, or there are none.
    """
    lm.renew_for_training()
    optimizer = lm.optimizer
    if learning_rate is not None:
        optimizer = new_optimizer(learning_rate=learning_rate, warmup_steps=0)
        if "float16" in lm.dtype_policy.name and "bfloat16" not in lm.dtype_policy.name:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    check_optimizer(optimizer, lm.trainable_variables)
    if not optimizer.built:
        optimizer.build(lm.trainable_variables)
    return optimizer
