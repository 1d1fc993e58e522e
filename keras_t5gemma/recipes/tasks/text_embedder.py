"""`[task] head = "text_embedder"`: rows with a query, a document and perhaps hard negatives."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import grain

from keras_t5gemma.heads.text_embedder import T5GemmaTextEmbedder
from keras_t5gemma.recipes.schema import Recipe, TaskSection
from keras_t5gemma.recipes.tasks.model import compiled
from keras_t5gemma.recipes.tasks.rows import held_out_rows, text, training_rows
from keras_t5gemma.training.losses.in_batch_negatives import InBatchNegatives


def make_model(recipe: Recipe) -> T5GemmaTextEmbedder:
    """Builds and compiles the embedder of a `Recipe`, with its preprocessor."""
    task = recipe.task
    options = {"pooling": task.pooling or "mean", "normalize": task.normalize, "dimensions": task.dimensions}
    inputs = {"encoder_sequence_length": task.sequence_length, "truncate": task.truncate}
    loss = InBatchNegatives(task.temperature, task.matryoshka or None)
    return compiled(T5GemmaTextEmbedder, recipe, options=options, inputs=inputs, loss=loss)


def training_batches(recipe: Recipe, embedder: T5GemmaTextEmbedder) -> grain.IterDataset:
    """Makes the endless dataset of a `Recipe`.

    Args:
        recipe: a `Recipe`.
        embedder: its model.

    Returns:
        A `grain.IterDataset` of (x, y, weights), as of `PairArrays`: x, `{"query": {"token_ids": [B, S], ...}, ...}`
        with "document" and, for further fields, hard negatives; y, the numbers of the texts [B, C].
    """
    rows = training_rows(recipe, recipe.task.text_fields, partial(_texts, task=recipe.task))
    batches = rows.batch(recipe.training.batch_size, drop_remainder=True, batch_fn=_columns)
    return batches.map(embedder.pair_arrays())


def measurement(recipe: Recipe, embedder: T5GemmaTextEmbedder) -> Callable[[], dict[str, float]]:
    """Makes the function that measures the embedder on the held-out rows of a `Recipe`, in batches as in training."""
    rows = list(held_out_rows(recipe, recipe.task.text_fields, partial(_texts, task=recipe.task)))
    model: Any = embedder
    return partial(model.evaluate, _columns(rows), batch_size=recipe.training.batch_size, verbose=0, return_dict=True)


def _texts(row: Mapping, *, task: TaskSection) -> tuple[str, ...]:
    return tuple(text(row, name) for name in task.text_fields)


def _columns(rows: Sequence[tuple[str, ...]]) -> tuple[list[str], ...]:
    return tuple(list(column) for column in zip(*rows, strict=True))
