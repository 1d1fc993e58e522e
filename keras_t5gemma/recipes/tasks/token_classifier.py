"""`[task] head = "token_classifier"`: rows with words, and a label per word."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import grain
import numpy as np

from keras_t5gemma.heads.token_classifier import T5GemmaTokenClassifier
from keras_t5gemma.recipes.schema import Recipe, TaskSection
from keras_t5gemma.recipes.tasks.held_out import labelled_batches, means
from keras_t5gemma.recipes.tasks.model import compiled
from keras_t5gemma.recipes.tasks.rows import held_out_rows, training_rows
from keras_t5gemma.training.losses.labels import IGNORED_LABEL


def make_model(recipe: Recipe) -> T5GemmaTokenClassifier:
    """Builds and compiles the classifier of a `Recipe`, with its preprocessor and a new head."""
    task = recipe.task
    options = {"stack": task.stack, "dropout": task.dropout, "num_classes": len(task.labels), "labels": task.labels}
    inputs = {"sequence_length": task.sequence_length, "truncate": task.truncate}
    return compiled(T5GemmaTokenClassifier, recipe, options=options, inputs=inputs)


def training_batches(recipe: Recipe, classifier: T5GemmaTokenClassifier) -> grain.IterDataset:
    """Makes the endless dataset of a `Recipe`.

    Args:
        recipe: a `Recipe`.
        classifier: its model.

    Returns:
        A `grain.IterDataset` of (x, y): x, a dict of `token_ids` and `padding_mask`, int32 [B, S]; y, int32 [B, S], the
        labels of words at their first pieces, elsewhere -100.
    """
    rows = training_rows(recipe, *_conversion(recipe, classifier))
    return rows.batch(recipe.training.batch_size, drop_remainder=True)


def held_out_batches(recipe: Recipe, classifier: T5GemmaTokenClassifier) -> list[tuple]:
    """The held-out rows of a `Recipe` as `labelled_batches`."""
    return labelled_batches(held_out_rows(recipe, *_conversion(recipe, classifier)), recipe.training.batch_size)


def measurement(recipe: Recipe, classifier: T5GemmaTokenClassifier) -> Callable[[], dict[str, float]]:
    """Makes the function that measures the classifier on the held-out rows of a `Recipe`: means over words."""
    return partial(means, classifier, held_out_batches(recipe, classifier), _words)


def _words(y: np.ndarray, weights: np.ndarray) -> float:
    """The number of labels that count."""
    return float(((y != IGNORED_LABEL) * weights[:, None]).sum())


def _conversion(recipe: Recipe, classifier: Any) -> tuple:
    task = recipe.task
    convert = partial(
        _arrays, task=task, preprocess=classifier.preprocessor.call, ids={name: i for i, name in enumerate(task.labels)}
    )
    return (*task.text_fields, task.label_field), convert


def _arrays(
    row: Mapping, *, task: TaskSection, preprocess: Callable, ids: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of a row, without B."""
    words, labels = row[task.text_fields[0]], row[task.label_field]
    for name, values, kinds in (("text_fields", words, str), ("label_field", labels, (str, int))):
        if not isinstance(values, list) or not all(isinstance(value, kinds) for value in values):
            what = "words" if kinds is str else "names or ids of labels, one per word"
            raise ValueError(f"[task] {name}: expected a list of {what}. Received: {values!r:.80}.")
    numbers = [ids.get(label, -1) if isinstance(label, str) else label for label in labels]
    for label, number in zip(labels, numbers, strict=True):
        if not 0 <= number < len(ids):
            raise ValueError(f"[task] labels: expected one of {', '.join(ids)}, or its id. Received: {label!r}.")
    x, y = preprocess([words], [numbers])
    return {name: array[0] for name, array in x.items()}, y[0].astype("int32")
