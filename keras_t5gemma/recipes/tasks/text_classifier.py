"""`[task] head = "text_classifier"`: rows with a text or a pair, and a label."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import grain
import numpy as np

from keras_t5gemma.heads.targets import TARGETS
from keras_t5gemma.heads.text_classifier import T5GemmaTextClassifier
from keras_t5gemma.recipes.schema import Recipe, TaskSection
from keras_t5gemma.recipes.tasks.held_out import labelled_batches, means
from keras_t5gemma.recipes.tasks.model import compiled
from keras_t5gemma.recipes.tasks.rows import held_out_rows, text, training_rows


def make_model(recipe: Recipe) -> T5GemmaTextClassifier:
    """Builds and compiles the classifier of a `Recipe`, with its preprocessor and a new head."""
    task = recipe.task
    options = {name: getattr(task, name) for name in ("problem", "stack", "dropout")}
    options |= {"pooling": task.pooling or "last", "num_classes": len(task.labels) or 1, "labels": task.labels or None}
    inputs = {name: getattr(task, name) for name in ("sequence_length", "truncate", "separator")}
    return compiled(T5GemmaTextClassifier, recipe, options=options, inputs=inputs)


def training_batches(recipe: Recipe, classifier: T5GemmaTextClassifier) -> grain.IterDataset:
    """Makes the endless dataset of a `Recipe`.

    Args:
        recipe: a `Recipe`.
        classifier: its model.

    Returns:
        A `grain.IterDataset` of (x, y): x, a dict of `token_ids` and `padding_mask`, int32 [B, S]; y, int32 [B] or for
        "multi" and "regression" float32 [B, C].
    """
    rows = training_rows(recipe, *_conversion(recipe, classifier))
    return rows.batch(recipe.training.batch_size, drop_remainder=True)


def held_out_batches(recipe: Recipe, classifier: T5GemmaTextClassifier) -> list[tuple]:
    """The held-out rows of a `Recipe` as `labelled_batches`."""
    return labelled_batches(held_out_rows(recipe, *_conversion(recipe, classifier)), recipe.training.batch_size)


def measurement(recipe: Recipe, classifier: T5GemmaTextClassifier) -> Callable[[], dict[str, float]]:
    """Makes the function that measures the classifier on the held-out rows of a `Recipe`."""
    batches = held_out_batches(recipe, classifier)
    # Metrics are weighted means. The loss is a mean over the batch in which the weights are factors.
    return partial(means, classifier, batches, lambda _, weights: weights.sum(), lambda _, weights: len(weights))


def _conversion(recipe: Recipe, classifier: Any) -> tuple:
    task = recipe.task
    convert = partial(_arrays, task=task, preprocess=classifier.preprocessor.call)
    return (*task.text_fields, task.label_field), convert


def _arrays(row: Mapping, *, task: TaskSection, preprocess: Callable) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of a row, without B."""
    texts = [text(row, name) for name in task.text_fields]
    x = preprocess(tuple(texts) if len(texts) > 1 else texts[0])
    y = TARGETS[task.problem]([row[task.label_field]], len(task.labels) or 1, task.labels or None)[0]
    return x, np.asarray(y)
