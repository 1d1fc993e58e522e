"""Measures held-out rows in the middle of a run."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import grain
import keras
import numpy as np


class HeldOutRows(keras.callbacks.Callback):
    """Adds the loss and the metrics of held-out rows to the logs: `val_loss`, `val_accuracy`.

    In epochs between two measurements they are NaN.

    Args:
        measure: a function that returns the loss and the metrics by name.
        every: epochs between two measurements.
    """

    def __init__(self, measure: Callable[[], dict[str, float]], every: int):
        super().__init__()
        self.measure, self.every = measure, every

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Adds the values to the logs."""
        metrics = [name for name in logs or {} if not name.startswith("val_")]
        values = self.measure() if (epoch + 1) % self.every == 0 else dict.fromkeys(metrics, math.nan)
        if logs is not None:
            logs |= {f"val_{name}": value for name, value in values.items()}


def labelled_batches(rows: grain.IterDataset, size: int) -> list[tuple]:
    """Reads rows (x, y) into batches of one size.

    Returns:
        A list of (x, y, weights): in the last batch, rows that fill it have the weight 0.
    """
    batches = []
    for x, y in rows.batch(size):
        places = np.minimum(np.arange(size), len(y) - 1)  # the last row again and again
        weights = (np.arange(size) < len(y)).astype("float32")
        batches.append(({name: array[places] for name, array in x.items()}, y[places], weights))
    return batches


def means(
    model: Any,
    batches: Sequence[tuple],
    count: Callable[[np.ndarray, np.ndarray], float],
    count_of_loss: Callable[[np.ndarray, np.ndarray], float] | None = None,
) -> dict[str, float]:
    """The loss and the metrics of a model over all rows of `labelled_batches`.

    Args:
        model: a compiled classifier.
        batches: of `labelled_batches`.
        count: a function of y and the weights of a batch: the number of labels that count.
        count_of_loss: by what the loss of a batch is divided, if it is another number.
    """
    sums, total = defaultdict(float), 0.0
    for x, y, weights in batches:
        values = model.test_on_batch(x, y, weights, return_dict=True)
        model.reset_metrics()
        total += count(y, weights)
        for name, value in values.items():
            counted = (count_of_loss or count) if name == "loss" else count
            sums[name] += float(value) * counted(y, weights)
    return {name: value / total for name, value in sums.items()}
