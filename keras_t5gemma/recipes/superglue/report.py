"""The results of all tasks as a table. Needs no Keras."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from keras_t5gemma.recipes.superglue.tasks import TASKS, Split


def task_summary(splits: tuple[Split, Split], truncated: int, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best cell of a task, with what it is compared with.

    Args:
        splits: of `read_task`.
        truncated: number of texts that were cut.
        results: of the cells.

    Returns:
        A dict of `accuracy`, `learning_rate`, `batch_size`, `dropout` and `epoch` of the best cell, None if no cell has
        an accuracy; of two that are as good, the first. `most_frequent` is the accuracy of the most frequent class.
    """
    train, dev = splits
    trained = [result for result in results if result["accuracy"] is not None]
    best = max(trained, key=lambda result: result["accuracy"]) if trained else {}
    names = ("accuracy", "learning_rate", "batch_size", "dropout", "epoch")
    return {
        **{name: best.get(name) for name in names},
        "most_frequent": Counter(dev.labels).most_common(1)[0][1] / len(dev.labels),
        "cells": len(results),
        "diverged": len(results) - len(trained),
        "train": len(train.labels),
        "dev": len(dev.labels),
        "truncated": truncated,
    }


def mean_accuracy(tasks: dict[str, dict]) -> float | None:
    """The mean of the tasks' accuracies; None if a task has none."""
    accuracies = [summary["accuracy"] for summary in tasks.values()]
    return None if None in accuracies else sum(accuracies) / len(accuracies)


def table(results: dict[str, Any]) -> Table:
    """The result of `superglue` as a table, in percent."""
    caption = "The best accuracy on the development set over the grid and the epochs, in percent."
    if len(results["tasks"]) < len(TASKS):
        caption += f" The mean is of {len(results['tasks'])} of SuperGLUE's {len(TASKS)} tasks."
    drawn = Table(caption=caption)
    drawn.add_column("task")
    for heading in ("train", "dev", "cut", "most frequent", "accuracy", "rate", "batch", "dropout", "epoch"):
        drawn.add_column(heading, justify="right")
    for name, summary in results["tasks"].items():
        sizes = [str(summary[key]) for key in ("train", "dev", "truncated")]
        if summary["accuracy"] is None:
            best = ["diverged", "", "", "", ""]
        else:
            numbers = [f"{summary[key]:g}" for key in ("learning_rate", "batch_size", "dropout", "epoch")]
            best = [f"{100 * summary['accuracy']:.1f}", *numbers]
        drawn.add_row(name, *sizes, f"{100 * summary['most_frequent']:.1f}", *best)
    mean = "none" if results["mean"] is None else f"{100 * results['mean']:.1f}"
    drawn.add_section()
    drawn.add_row("mean", "", "", "", "", mean, "", "", "", "")
    return drawn
