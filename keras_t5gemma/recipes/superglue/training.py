"""Trains one cell."""

import dataclasses
import gc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from rich.console import Console

from keras_t5gemma.heads.text_classifier import T5GemmaTextClassifier
from keras_t5gemma.heads.text_inputs import T5GemmaTextClassifierPreprocessor
from keras_t5gemma.recipes.superglue.cells import Cell
from keras_t5gemma.recipes.superglue.tasks import TASKS, Split
from keras_t5gemma.training.callbacks.progress_bar import ProgressBar, progress_display
from keras_t5gemma.training.optimizers.factory import optimizer

# RoBERTa's for GLUE (arXiv 1907.11692, table 10), as is the grid. Its schedule is linear, this one is a cosine to 0.
_WARMUP, _WEIGHT_DECAY = 0.06, 0.1


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A task as the model reads it.

    Attributes:
        train: x and y of training, x with `token_ids` and `padding_mask` [B, S].
        dev: x and y of development.
        truncated: number of texts that were cut to S tokens.
    """

    train: tuple[dict, np.ndarray]
    dev: tuple[dict, np.ndarray]
    truncated: int


def encode(model: str, task: str, splits: tuple[Split, Split], sequence_length: int) -> Encoded:
    """Tokenizes a task.

    Args:
        model: a T5Gemma, as for `T5GemmaTextClassifier.from_preset`.
        task: a name in `TASKS`.
        splits: of `read_task`.
        sequence_length: S; longer texts are cut.
    """
    cut = {"sequence_length": sequence_length, "truncate": TASKS[task].truncate}
    preprocessor: Any = T5GemmaTextClassifierPreprocessor.from_preset(model, **cut)
    truncated = sum(len(ids) > sequence_length for split in splits for ids in preprocessor.tokenizer(split.texts))
    train, dev = ((preprocessor.call(split.texts), np.array(split.labels, "int32")) for split in splits)
    return Encoded(train, dev, truncated)


def train_cell(
    model: str, cell: Cell, data: Encoded, *, epochs: int, dtype: str, seed: int, title: str, console: Console
) -> dict[str, Any]:
    """Trains all weights of the encoder and a new head on the last token.

    Args:
        model: a T5Gemma, as for `T5GemmaTextClassifier.from_preset`.
        cell: the hyperparameters.
        data: of `encode`.
        epochs: passes over the training set.
        dtype: dtype policy of the encoder.
        seed: of the head, the order and dropout.
        title: the text before the progress bar.
        console: where the bar is shown.

    Returns:
        A dict of `accuracies` on the development set and `losses`, a number per epoch until a loss is not finite; and
        `accuracy`, the best of these, and its `epoch`. Both are None if no epoch ended with a finite loss.
    """
    keras.utils.set_random_seed(seed)
    labels = TASKS[cell.task].labels
    head = {"num_classes": len(labels), "labels": labels, "dropout": cell.dropout, "pooling": "last"}
    classifier = T5GemmaTextClassifier.from_preset(model, dtype=dtype, preprocessor=None, **head)
    (x, y), steps = data.train, epochs * math.ceil(len(data.train[1]) / cell.batch_size)
    rate = {"learning_rate": cell.learning_rate, "steps": steps, "warmup_steps": round(_WARMUP * steps)}
    classifier.compile(optimizer("adamw", **rate, final_fraction=0.0, weight_decay=_WEIGHT_DECAY))
    with progress_display(console) as display:
        bar = ProgressBar(display, title, steps)
        callbacks = [keras.callbacks.TerminateOnNaN(), bar]
        options = {"batch_size": cell.batch_size, "epochs": epochs, "callbacks": callbacks, "verbose": 0}
        history = classifier.fit(x, y, validation_data=data.dev, **options).history
    del classifier
    gc.collect()  # the optimizer's state of the last cell and the next model might not fit together
    return summary(history)


def summary(history: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What `train_cell` returns, of the `loss` and the `val_accuracy` of each epoch."""
    finite = [i for i, loss in enumerate(history["loss"]) if math.isfinite(loss)]
    accuracies = [float(history["val_accuracy"][i]) for i in finite]
    best = int(np.argmax(accuracies)) if accuracies else None
    return {
        "accuracy": None if best is None else accuracies[best],
        "epoch": None if best is None else best + 1,
        "accuracies": accuracies,
        "losses": [float(history["loss"][i]) for i in finite],
    }
