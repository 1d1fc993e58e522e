"""Builds the classifier of the section `[task]` of a recipe, its data and its held-out measurement."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import grain
import keras
import numpy as np

from keras_t5gemma.data.pipelines.streams import in_order
from keras_t5gemma.heads.targets import TARGETS
from keras_t5gemma.heads.text_classifier import T5GemmaTextClassifier
from keras_t5gemma.heads.text_inputs import T5GemmaTextClassifierPreprocessor
from keras_t5gemma.recipes.components import adapted, make_optimizer, open_source
from keras_t5gemma.recipes.schema import Recipe, TaskSection


def compiled_classifier(recipe: Recipe) -> T5GemmaTextClassifier:
    """Builds and compiles the classifier of a `Recipe` with a task, with its preprocessor and a new head."""
    section, task = recipe.model, recipe.task
    options = {name: getattr(task, name) for name in ("problem", "pooling", "stack", "dropout")}
    options |= {"num_classes": len(task.labels) or 1, "labels": task.labels or None}
    inputs = {name: getattr(task, name) for name in ("sequence_length", "truncate", "separator")}
    if section.preset:
        try:
            preprocessor = T5GemmaTextClassifierPreprocessor.from_preset(section.preset, **inputs)
        except ValueError as error:
            raise ValueError(f"[model] preset: a task needs a preset with a tokenizer. {error}") from error
        options |= {"preprocessor": preprocessor, "dtype": section.dtype}
        classifier = T5GemmaTextClassifier.from_preset(section.preset, **options)
    else:
        backbone, tokenizer = adapted(recipe)
        preprocessor = T5GemmaTextClassifierPreprocessor(tokenizer, **inputs)
        classifier = T5GemmaTextClassifier(backbone, preprocessor=preprocessor, **options)
    backbone = cast(Any, classifier.backbone)  # keras-hub's class does not say its type
    if section.lora_rank:
        backbone.enable_lora(section.lora_rank)
    backbone.rematerialize = section.rematerialize
    classifier.compile(make_optimizer(recipe), accumulation_steps=recipe.training.accumulation_steps)
    return classifier


def labelled_data(recipe: Recipe, classifier: T5GemmaTextClassifier) -> grain.IterDataset:
    """Makes the endless dataset of a `Recipe` with a task.

    Args:
        recipe: a `Recipe`.
        classifier: its model.

    Returns:
        A `grain.IterDataset` of (x, y): x, a dict of `token_ids` and `padding_mask`, int32 [B, S]; y, int32 [B] or for
        "multi" and "regression" float32 [B, C].
    """
    rows = _rows(recipe, recipe.data.sources, classifier, shuffle=True, num_epochs=None)
    return rows.batch(recipe.training.batch_size, drop_remainder=True)


def held_out_labels(recipe: Recipe, classifier: T5GemmaTextClassifier) -> list[tuple]:
    """Reads the held-out rows of a `Recipe` with a task.

    Args:
        recipe: a `Recipe`.
        classifier: its model.

    Returns:
        A list of batches (x, y, weights), of one size: in the last one, rows that fill it have the weight 0.
    """
    size = recipe.training.batch_size
    batches = []
    for x, y in _rows(recipe, recipe.data.validation, classifier, shuffle=False, num_epochs=1).batch(size):
        rows = np.minimum(np.arange(size), len(y) - 1)  # the last row again and again
        weights = (np.arange(size) < len(y)).astype("float32")
        batches.append(({name: array[rows] for name, array in x.items()}, y[rows], weights))
    return batches


class HeldOutLabels(keras.callbacks.Callback):
    """Measures the loss and the metrics of held-out rows, and adds them to the logs: `val_loss`, `val_accuracy`.

    In epochs between two measurements they are NaN.

    Args:
        batches: of `held_out_labels`.
        every: epochs between two measurements.
    """

    def __init__(self, batches: Sequence[tuple], every: int):
        super().__init__()
        self.batches, self.every = batches, every

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Adds the values to the logs."""
        metrics = [name for name in logs or {} if not name.startswith("val_")]
        values = self._measure() if (epoch + 1) % self.every == 0 else dict.fromkeys(metrics, math.nan)
        if logs is not None:
            logs |= {f"val_{name}": value for name, value in values.items()}

    def _measure(self) -> dict[str, float]:
        """The means over all rows."""
        model, sums, rows = cast(Any, self.model), defaultdict(float), 0
        for x, y, weights in self.batches:
            values = model.test_on_batch(x, y, weights, return_dict=True)
            model.reset_metrics()
            count = int(weights.sum())
            rows += count
            for name, value in values.items():
                # The loss is a mean over the batch in which the weights are factors, metrics are weighted means.
                sums[name] += float(value) * (len(weights) if name == "loss" else count)
        return {name: value / rows for name, value in sums.items()}


def _rows(
    recipe: Recipe, paths: Sequence[str], classifier: T5GemmaTextClassifier, *, shuffle: bool, num_epochs: int | None
) -> grain.IterDataset:
    """The rows of files as arrays (x, y) without B."""
    data = recipe.data
    return in_order(
        open_source(recipe, paths, 0),
        partial(_arrays, task=recipe.task, preprocess=cast(Any, classifier.preprocessor).call),
        seed=recipe.training.seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
        shuffle_buffer=data.shuffle_buffer,
        num_workers=data.num_workers,
    )


def _arrays(row: Any, *, task: TaskSection, preprocess: Callable) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of a row. An error message shows the row."""
    try:
        if not isinstance(row, Mapping):
            raise ValueError("A row of a task must have fields, as in JSONL.")
        if missing := [name for name in (*task.text_fields, task.label_field) if name not in row]:
            raise ValueError(
                f"A row lacks {' and '.join(map(repr, missing))}; it has {', '.join(map(str, row))}. [task] "
                f"text_fields and label_field name the fields."
            )
        texts = [row[name] for name in task.text_fields]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"[task] text_fields: expected texts. Received: {wrong[0]!r:.80}.")
        x = preprocess(tuple(texts) if len(texts) > 1 else texts[0])
        y = TARGETS[task.problem]([row[task.label_field]], len(task.labels) or 1, task.labels or None)[0]
    except ValueError as error:
        raise ValueError(f"{error} The row: {row!r:.200}") from error
    return x, np.asarray(y)
