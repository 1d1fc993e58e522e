"""`evaluate`: benchmarks by lm-evaluation-harness."""

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_t5gemma.checks import is_number
from keras_t5gemma.evaluation import human_eval
from keras_t5gemma.evaluation.extra import require_lm_eval
from keras_t5gemma.evaluation.plan import Plan, plan
from keras_t5gemma.evaluation.suites import Benchmark
from keras_t5gemma.suggestions import check_choice, did_you_mean

# The harness's results that are dicts by task, so that those of several runs can be joined.
_BY_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
# Arguments of `lm_eval.simple_evaluate` that `evaluate` sets.
_SET_HERE = ("model", "tasks", "num_fewshot", "batch_size", "limit", "task_manager", "apply_chat_template")
_SET_HERE += ("confirm_run_unsafe_code",)


def evaluate(
    lm,
    tasks: str | Sequence,
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    chat: bool | str = "auto",
    include_path: str | os.PathLike[str] | Sequence | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    run_code: bool = False,
    **harness: Any,
) -> dict:
    """Measures a model on benchmarks, by lm-evaluation-harness.

    Example:
        >>> kt.evaluate(lm, ["arc_easy", "gsm8k"], limit=100)["results"]["arc_easy"]["acc_norm,none"]

    Args:
        lm: a `T5GemmaSeq2SeqLM` with a preprocessor, or a preset. Or a `HarnessLM`, for its other options; `batch_size`
            and `max_length` are then its own.
        tasks: names of the harness's tasks, groups or tags, task files, or the harness's other forms of tasks; or a
            suite, "pt" or "it": the paper's benchmarks for pretrained or instruction-tuned models, with Gemma 2's
            numbers of examples. "humaneval" is this package's.
        num_fewshot: examples in the prompt; None for each task's own.
        limit: how many rows of each task, or a share below 1; None for all.
        chat: whether contexts are in Gemma's turns; "auto" for what the model's preprocessor says.
        include_path: folders with your own task files (.yaml).
        batch_size: the maximum number of contexts that the encoder reads at once.
        max_length: the maximum number of tokens of a context; longer ones are cut on the left, with a warning. None for
            8,192.
        run_code: whether programs that the model writes may run, which HumanEval and MBPP need. HumanEval's run in
            processes with limits, see `keras_t5gemma.evaluation.code_runner`; the harness runs MBPP's by itself.
        **harness: further arguments of `lm_eval.simple_evaluate`, such as `log_samples`, `gen_kwargs`,
            `system_instruction` and `bootstrap_iters`.

    Returns:
        The harness's dict, with `results` by task. `keras_t5gemma` has the versions, the preset, backend, dtype and
        quantization, how many contexts were cut, and for a suite each benchmark in percent and their mean.

    Raises:
        ImportError: if lm-evaluation-harness is not installed.
        TypeError: if an argument is unknown.
        ValueError: if a task is unknown or runs code, or an option is invalid.
        ConnectionError: if a task needs data from a hub that cannot be reached.
    """
    require_lm_eval()
    _check_options(harness)
    planned = plan(tasks, num_fewshot, include_path, run_code)
    return run_plan(planned, harness_lm(lm, batch_size, max_length), limit, chat, **harness)


def _check_options(harness: Mapping[str, Any]) -> None:
    """Raises a TypeError for arguments that neither `evaluate` nor the harness has."""
    import lm_eval

    own = list(inspect.signature(evaluate).parameters)
    theirs = [name for name in inspect.signature(lm_eval.simple_evaluate).parameters if name not in _SET_HERE]
    if unknown := [name for name in harness if name not in theirs]:
        hint = did_you_mean(unknown[0], own + theirs) or " See the arguments of lm_eval.simple_evaluate."
        raise TypeError(f"evaluate() got an unexpected keyword argument {unknown[0]!r}.{hint}")


def harness_lm(lm, batch_size: int, max_length: int | None, preset: str | None = None):
    """A model as a `HarnessLM`; see `evaluate`.

    Args:
        lm: as for `evaluate`, like the following arguments.
        batch_size: as for `evaluate`.
        max_length: as for `evaluate`.
        preset: the name of the model's preset, for the results; None if it is known to `lm` or unknown.

    Raises:
        ValueError: if it is one already, and an option is set beside it.
    """
    from keras_t5gemma.evaluation.harness import HarnessLM

    if not isinstance(lm, HarnessLM):
        lm = HarnessLM(lm, batch_size, max_length)
        lm.preset = lm.preset or preset
        return lm
    if (batch_size, max_length) != (8, None):
        raise ValueError("`lm` is a HarnessLM, which has a batch_size and a max_length: set them there.")
    return lm


def run_plan(planned: Plan, lm, limit: int | float | None, chat: bool | str, **harness: Any) -> dict:
    """Runs what `plan` has checked; see `evaluate`.

    Args:
        planned: a `Plan`.
        lm: a `HarnessLM`.
        limit: as for `evaluate`, like the following arguments.
        chat: whether contexts are in turns.
        **harness: arguments of `lm_eval.simple_evaluate`.
    """
    if limit is not None and not (is_number(limit) and limit > 0 and (limit < 1 or limit == int(limit))):
        raise ValueError(f"`limit` must be a positive integer, a share below 1, or None. Received: limit={limit!r}.")
    if not isinstance(chat, bool):
        check_choice(chat, "chat", ("auto",), others=", or True or False")
        chat = lm.lm.preprocessor.chat
    results: dict[str, Any] = {}
    if len(planned.groups) > 1:  # so that a task without its data is found before hours of work
        _reaching_hub(planned.manager.load, [task for group in planned.groups.values() for task in group])
    for shots, group in planned.groups.items():
        _join(results, _reaching_hub(_run_group, planned, lm, group, shots, limit, chat, harness))
    if planned.has_human_eval:
        found = human_eval.pass_at_1(lm, chat, limit)
        name, samples = human_eval.NAME, found["samples"]
        added = {"results": {name: {"alias": name, "pass@1,none": found["pass@1"]}}, "n-shot": {name: 0}}
        added["n-samples"] = {name: {"original": 164, "effective": len(samples)}}
        added["samples"] = {name: samples} if harness.get("log_samples", True) else {}
        _join(results, added)
    facts = {**lm.get_model_info(), "chat": chat, "limit": limit}
    if planned.benchmarks is not None:
        facts |= {"suite": suite_scores(planned.benchmarks, results["results"]), "skipped": planned.skipped}
    return {**results, "keras_t5gemma": facts}


def suite_scores(benchmarks: Sequence[Benchmark], results: Mapping[str, Mapping]) -> dict:
    """The numbers of a suite, in percent.

    Args:
        benchmarks: the suite's.
        results: the harness's `results`, by task.

    Returns:
        A dict of each benchmark that was measured, and the mean as `mean of n`. A tag without a number of its own, such
        as MGSM's, counts as the mean of its tasks.
    """
    scores: dict[str, float] = {}
    for row in benchmarks:
        tasks = [task for task in results if row.task and (task == row.task or task.startswith(f"{row.task}_"))]
        tasks = [row.task] if row.task in tasks else tasks
        values = [results[task][row.metric] for task in tasks if row.metric in results[task]]
        if values:
            scores[row.name] = 100 * sum(values) / len(values)
    return {**scores, f"mean of {len(scores)}": sum(scores.values()) / len(scores)} if scores else {}


def write_results(results: Mapping, path: str | os.PathLike[str]) -> None:
    """Writes what `evaluate` returned as JSON.

    Args:
        results: the dict.
        path: the file.
    """
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _run_group(planned: Plan, lm, tasks: list, shots: int | None, limit, chat: bool, harness: dict) -> dict:
    """Runs tasks with one number of examples."""
    import lm_eval

    if planned.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric of the harness's tasks with code asks for it
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        num_fewshot=shots,
        batch_size=lm.batch_size,
        limit=limit,
        task_manager=planned.manager,
        apply_chat_template=chat,
        confirm_run_unsafe_code=planned.run_code,
        **harness,
    )


def _reaching_hub(function, *arguments):
    """Calls a function that loads tasks. If a hub cannot be reached, the error says what helps."""
    try:
        return function(*arguments)
    except ConnectionError as error:
        raise ConnectionError(
            f"A task needs data from a hub: {error}. Data that was loaded once is kept in HF_HOME. Without a network, "
            f"use tasks of local files: `include_path` (--include-path) and dataset_path: json."
        ) from error


def _join(results: dict, new: Mapping) -> None:
    """Adds one run's results to those before."""
    for key, value in new.items():
        if key in (*_BY_TASK, "samples") and key in results:
            results[key] = {**results[key], **value}
        elif key not in results:
            results[key] = value
