"""The demo's outputs: a table, a plot, completions, and a file with every number."""

import dataclasses
import itertools
import json
import os
import platform
from importlib.metadata import version

from rich.table import Table
from rich.text import Text

from keras_t5gemma.training.callbacks.plots import LOSS_LABEL, picture

VERSIONS_OF = ("keras-t5gemma", "keras", "keras-hub", "numpy")


def results_table(results):
    """A rich table with a row a training run."""
    table = Table(title="Held-out loss a target token, in nats (lower is better)")
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


def verdict(results):
    """What the numbers say about adapting, in a sentence a pair."""
    sentences = []
    for adapted, scratch in zip(results[::2], results[1::2], strict=True):
        starts, ends = adapted.before - scratch.before, adapted.after - scratch.after
        sentences.append(
            f"{adapted.pair.capitalize()}: adapted from Gemma 2 it starts {_difference(starts)} and ends "
            f"{_difference(ends)} than from scratch, after the same {len(adapted.losses)} steps."
        )
    return "\n".join(sentences)


def answers_table(tuned, rows=6):
    """A rich table of the first held-out dates and what each model made of them.

    Args:
        tuned: of `Answers` to the same prompts.
        rows: number of dates to show.
    """
    table = Table(title="Held-out dates, written as ISO 8601")
    for heading in ("prompt", "right answer", *(answers.start for answers in tuned)):
        table.add_column(heading)
    first = tuned[0]
    asked = zip(first.prompts, first.truths, *(answers.answers for answers in tuned), strict=True)
    for prompt, truth, *given in itertools.islice(asked, rows):
        table.add_row(prompt, truth, *(Text(text, style="green" if text == truth else "red") for text in given))
    return table


def score_line(answers):
    """How many answers of a model are right, in a line."""
    return f"{answers.start}: {answers.right} of {len(answers.truths)} held-out dates right"


def plot_losses(results, tuned, path):
    """Draw the training loss of each run, one panel per pair and one for the dates.

    Dots are the held-out loss before and after.

    Args:
        results: of `Result`.
        tuned: of `Answers`.
        path: the PNG to write.

    Returns:
        Whether it was drawn: not without Matplotlib, the extra `plots`.
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


def _draw(panel, results):
    """The runs of one pair."""
    for result in results:
        steps = len(result.losses)
        (line,) = panel.plot(range(1, steps + 1), _smooth(result.losses), label=result.start)
        panel.plot([0, steps], [result.before, result.after], "o", color=line.get_color())
        panel.set_title(f"{result.pair}, {result.objective}")
    panel.set_xlabel("step")
    panel.set_ylabel(LOSS_LABEL)
    panel.legend(title="lines: training, dots: held out")


def _draw_dates(panel, tuned):
    """The loss on dates of the models of one pair."""
    for answers in tuned:
        label = f"{answers.start}, {answers.right} of {len(answers.truths)} right"
        panel.plot(range(1, len(answers.losses) + 1), _smooth(answers.losses), label=label)
    panel.set_title("balanced, fine-tuned on dates")
    panel.set_xlabel("step")
    panel.set_ylabel(LOSS_LABEL)
    panel.legend()


def complete(models, texts, tokenizer, prompt_length, max_length):
    """Continue held-out texts with each model, by its compiled sampler.

    Args:
        models: {name: `T5GemmaSeq2SeqLM` with a preprocessor}.
        texts: documents.
        tokenizer: splits them after `prompt_length` tokens.
        prompt_length: tokens of the text the encoder reads.
        max_length: tokens to generate, `<bos>` included.

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


def format_completion(completion):
    """A completion as text, a paragraph a voice."""
    return "\n\n".join(f"[{voice}]\n{text}" for voice, text in completion.items())


def environment(backend):
    """Where the numbers come from: machine and versions."""
    return {
        "backend": backend,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        **{package: _version(package) for package in (*VERSIONS_OF, backend)},
    }


def write_results(results, tuned, pretraining, seconds, backend, path):
    """Write every number of a run as JSON.

    Args:
        results: of `Result`.
        tuned: of `Answers`.
        pretraining: {name: held-out loss} of each Gemma 2.
        seconds: the whole demo's time.
        backend: Keras's.
        path: the file to write.
    """
    values = {
        "seconds": round(seconds, 1),
        "environment": environment(backend),
        "pretraining_held_out_loss": pretraining,
        "results": [dataclasses.asdict(result) for result in results],
        "dates": [{**dataclasses.asdict(answers), "right": answers.right} for answers in tuned],
    }
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _smooth(losses, keep=0.9):
    """An exponential mean without the bias of its start: mean_t = sum keep^(t-i) loss_i / sum keep^(t-i)."""
    means, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = total * keep + loss, weight * keep + 1
        means.append(total / weight)
    return means


def _version(package):
    try:
        return version(package)
    except ModuleNotFoundError:  # a checkout that is not installed
        return None


def _difference(nats):
    return f"{abs(nats):.2f} nats {'lower' if nats < 0 else 'higher'}"
