"""The demo's outputs: tables, a plot, completions, and a file with every number."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from keras_t5gemma.training.callbacks.plots import LOSS_LABEL, picture

if TYPE_CHECKING:
    import keras_t5gemma as kt
    from keras_t5gemma.demo.adaptation import Result
    from keras_t5gemma.demo.finetuning import Answers

VERSIONS_OF = ("keras-t5gemma", "keras", "keras-hub", "numpy")


def results_table(results: Sequence[Result]) -> Table:
    """A rich table with one row per training run."""
    table = Table(title="Held-out loss per target token, in nats (lower is better)")
    for heading in ("pair", "objective", "start"):
        table.add_column(heading)
    for heading in ("parameters", "steps", "before", "after"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.pair,
            result.objective,
            result.start,
            f"{result.parameters:,}",
            f"{len(result.losses)}",
            f"{result.before:.2f}",
            f"{result.after:.2f}",
            end_section=result.start == "from scratch",
        )
    return table


def verdict(results: Sequence[Result]) -> str:
    """Compares the losses of adapted models and of models from scratch, in one sentence per pair."""
    sentences = []
    for adapted, scratch in zip(results[::2], results[1::2], strict=True):
        starts, ends = adapted.before - scratch.before, adapted.after - scratch.after
        sentences.append(
            f"{adapted.pair.capitalize()}: adapted from Gemma 2 it starts {_difference(starts)} and ends "
            f"{_difference(ends)} than from scratch, after the same {len(adapted.losses)} steps."
        )
    return "\n".join(sentences)


def answers_table(tuned: Sequence[Answers], rows: int = 6) -> Table:
    """A rich table of the first held-out dates and each model's answers.

    Args:
        tuned: several `Answers` to the same prompts.
        rows: number of dates to show.

    Returns:
        A `rich.table.Table`.
    """
    table = Table(title="Held-out dates, written as ISO 8601")
    for heading in ("prompt", "right answer", *(answers.start for answers in tuned)):
        table.add_column(heading)
    first = tuned[0]
    questions = zip(first.prompts, first.truths, *(answers.answers for answers in tuned), strict=True)
    for prompt, truth, *texts in itertools.islice(questions, rows):
        table.add_row(prompt, truth, *(Text(text, style="green" if text == truth else "red") for text in texts))
    return table


def score_line(answers: Answers) -> str:
    """A line with the number of right answers of a model."""
    return f"{answers.start}: {answers.right} of {len(answers.truths)} held-out dates right"


def benchmark_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """A rich table of the harness's numbers of the adapted model.

    Args:
        before: {task: share of right answers} before fine-tuning.
        after: the same after it.

    Returns:
        A `rich.table.Table`.
    """
    table = Table(title="The adapted model on held-out dates, by lm-evaluation-harness, in percent")
    for heading in ("task", "before fine-tuning", "after"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, share in before.items():
        table.add_row(task, f"{100 * share:.1f}", f"{100 * after[task]:.1f}")
    return table


def plot_losses(results: Sequence[Result], tuned: Sequence[Answers], path: Path) -> bool:
    """Draws the training loss of each run, with one panel per pair and one for the dates.

    Dots are the held-out loss before and after.

    Args:
        results: the training runs.
        tuned: the answers of fine-tuned models.
        path: the PNG to write.

    Returns:
        Whether the plot was drawn. It needs Matplotlib, the extra `plots`.
    """
    pairs = list(dict.fromkeys(result.pair for result in results))
    try:
        with picture(path, len(pairs) + 1) as (*panels, last):
            for panel, pair in zip(panels, pairs, strict=True):
                _draw(panel, [result for result in results if result.pair == pair])
            _draw_dates(last, tuned)
    except ImportError:
        return False
    return True


def _draw(panel: Any, results: Sequence[Result]) -> None:
    """Draws the runs of one pair on Matplotlib's axes."""
    for result in results:
        steps = len(result.losses)
        (line,) = panel.plot(range(1, steps + 1), _smooth(result.losses), label=result.start)
        panel.plot([0, steps], [result.before, result.after], "o", color=line.get_color())
        panel.set_title(f"{result.pair}, {result.objective}")
    panel.set_xlabel("step")
    panel.set_ylabel(LOSS_LABEL)
    panel.legend(title="lines: training, dots: held out")


def _draw_dates(panel: Any, tuned: Sequence[Answers]) -> None:
    """Draws the loss on dates of the models of one pair on Matplotlib's axes."""
    for answers in tuned:
        label = f"{answers.start}, {answers.right} of {len(answers.truths)} right"
        panel.plot(range(1, len(answers.losses) + 1), _smooth(answers.losses), label=label)
    panel.set_title("balanced, fine-tuned on dates")
    panel.set_xlabel("step")
    panel.set_ylabel(LOSS_LABEL)
    panel.legend()


def complete(
    models: Mapping[str, kt.T5GemmaSeq2SeqLM],
    texts: Sequence[str],
    tokenizer: kt.T5GemmaTokenizer,
    prompt_length: int,
    max_length: int,
) -> list[dict[str, str]]:
    """Continues held-out texts with each model, by its compiled sampler.

    Args:
        models: {name: `T5GemmaSeq2SeqLM` with a preprocessor}.
        texts: documents.
        tokenizer: splits each text after `prompt_length` tokens.
        prompt_length: number of tokens that the encoder reads.
        max_length: number of tokens to generate, `<bos>` included.

    Returns:
        A list of {"prompt", "truth", name of each model: its completion}.
    """
    completions = []
    for text in texts:
        ids = tokenizer(text)
        completions.append(
            {
                "prompt": tokenizer.detokenize(ids[:prompt_length]),
                "truth": tokenizer.detokenize(ids[prompt_length : prompt_length + max_length - 1]),
            }
        )
    prompts = [completion["prompt"] for completion in completions]
    for name, model in models.items():
        for completion, text in zip(completions, model.generate(prompts, max_length=max_length), strict=True):
            completion[name] = text
    return completions


def format_completion(completion: Mapping[str, str]) -> str:
    """A completion as text, with one paragraph for the prompt, the truth and each model."""
    return "\n\n".join(f"[{speaker}]\n{text}" for speaker, text in completion.items())


def environment(backend: str) -> dict[str, Any]:
    """The machine and the versions behind the numbers."""
    return {
        "backend": backend,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        **{package: _version(package) for package in (*VERSIONS_OF, backend)},
    }


def write_results(
    results: Sequence[Result],
    tuned: Sequence[Answers],
    pretraining: Mapping[str, float],
    benchmark: tuple[Mapping[str, float] | None, Mapping[str, float] | None],
    seconds: float,
    backend: str,
    path: Path,
) -> None:
    """Writes every number of a run as JSON.

    Args:
        results: the training runs.
        tuned: the answers of fine-tuned models.
        pretraining: {name: held-out loss} of each Gemma 2.
        benchmark: {task: share of right answers} of the adapted model before and after fine-tuning, None if it was not
            measured.
        seconds: duration of the demo.
        backend: name of Keras's backend.
        path: the file to write.
    """
    values = {
        "seconds": round(seconds, 1),
        "environment": environment(backend),
        "pretraining_held_out_loss": pretraining,
        "results": [dataclasses.asdict(result) for result in results],
        "dates": [{**dataclasses.asdict(answers), "right": answers.right} for answers in tuned],
        "benchmark": dict(zip(("before", "after"), benchmark, strict=True)),
    }
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _smooth(losses: Sequence[float], decay: float = 0.9) -> list[float]:
    """An exponential mean without the bias of its start: mean_t = sum decay^(t-i) loss_i / sum decay^(t-i)."""
    means, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = total * decay + loss, weight * decay + 1
        means.append(total / weight)
    return means


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:  # e.g. this package in a checkout that is not installed
        return None


def _difference(nats: float) -> str:
    return f"{abs(nats):.2f} nats {'lower' if nats < 0 else 'higher'}"
