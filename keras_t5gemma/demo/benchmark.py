"""The last chapter: lm-evaluation-harness measures a model before and after it is fine-tuned on dates.

dates_choice   Which of four dates, a day, a month or a year apart, is the one in the prompt? By likelihood.
dates_text     The date as text. By generation, as in the demo's own count.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

import keras_t5gemma as kt
from keras_t5gemma.demo.dates import date_pairs, split_dates
from keras_t5gemma.demo.finetuning import ANSWER_LENGTH
from keras_t5gemma.demo.settings import DemoSettings
from keras_t5gemma.evaluation.extra import require_lm_eval

# A task -> its metric.
METRICS = {"dates_choice": "acc", "dates_text": "exact_match"}
_APART = (1, 31, 366)  # days from the right answer to a wrong one
_MEAN = {"aggregation": "mean", "higher_is_better": True}
_BATCH_SIZE = 64


def date_rows(settings: DemoSettings) -> list[dict[str, Any]]:
    """The held-out questions of the demo as rows of both tasks.

    Args:
        settings: the `DemoSettings`.

    Returns:
        A list of {"prompt": a date as written, "date": ISO 8601, "choices": four dates, "answer": the right one's
        index}.
    """
    _, held_out = split_dates(settings.held_out_dates, settings.seed)
    questions = date_pairs(held_out, seed=settings.seed + 1)
    generator, rows = random.Random(settings.seed), []
    for date, prompt, answer in zip(held_out, *questions.values(), strict=True):
        choices = [answer, *((date + datetime.timedelta(days)).isoformat() for days in _APART)]
        generator.shuffle(choices)
        rows.append({"prompt": prompt, "date": answer, "choices": choices, "answer": choices.index(answer)})
    return rows


def measure(lm: kt.T5GemmaSeq2SeqLM, settings: DemoSettings) -> dict[str, float]:
    """Measures a model on both tasks. The state of the random generators stays as it is.

    Args:
        lm: a `T5GemmaSeq2SeqLM` with a preprocessor.
        settings: the `DemoSettings`.

    Returns:
        {task: share of right answers}.
    """
    tasks = _tasks(date_rows(settings))
    options: dict[str, Any] = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    # Models and the harness draw from these, and training after it must not depend on whether it is installed.
    states = random.getstate(), np.random.get_state()
    try:
        results = kt.evaluate(lm, tasks, batch_size=_BATCH_SIZE, bootstrap_iters=0, log_samples=False, **options)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    return {task: float(results["results"][task][f"{metric},none"]) for task, metric in METRICS.items()}


def measure_if_installed(lm: kt.T5GemmaSeq2SeqLM, settings: DemoSettings, console: Console) -> dict[str, float] | None:
    """As `measure`; without lm-evaluation-harness None, and a line that says what installs it.

    Args:
        lm: as for `measure`.
        settings: as for `measure`.
        console: the demo's.
    """
    try:
        require_lm_eval()
    except ImportError as error:
        console.print(Text(f"The last chapter, a benchmark before and after fine-tuning, is left out. {error}"))
        return None
    return measure(lm, settings)


def _tasks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both tasks in the form of the harness."""
    shared = {
        "custom_dataset": _as_dataset(rows),
        "test_split": "test",
        "doc_to_text": itemgetter("prompt"),  # a template would make a number of "20240305"
        "target_delimiter": "",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    text = {"output_type": "generate_until", "doc_to_target": "{{date}}"}
    text["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": ANSWER_LENGTH - 1, "do_sample": False}
    return [
        {"task": task, **shared, **own, "metric_list": [{"metric": metric, **_MEAN}]}
        for (task, metric), own in zip(METRICS.items(), (choice, text), strict=True)
    ]


def _as_dataset(rows: list[dict[str, Any]]) -> Callable:
    """A function that returns the rows as the harness's data."""

    def load(**_: Any) -> Any:
        import datasets

        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

    return load
