"""`HEADS`: the heads by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import grain

from keras_t5gemma.recipes.schema import Recipe
from keras_t5gemma.recipes.tasks import text_classifier, text_embedder, token_classifier


class TaskHead(NamedTuple):
    """What a head of `[task]` needs.

    Attributes:
        make_model: makes the compiled model of a `Recipe`.
        training_batches: makes the endless dataset of batches of a `Recipe` and its model.
        measurement: makes the function that measures the model on the held-out rows of the `Recipe`: it returns the
            loss and the metrics by name.
    """

    make_model: Callable[[Recipe], Any]
    training_batches: Callable[[Recipe, Any], grain.IterDataset]
    measurement: Callable[[Recipe, Any], Callable[[], dict[str, float]]]


HEADS = {
    name: TaskHead(module.make_model, module.training_batches, module.measurement)
    for name, module in (
        ("text_classifier", text_classifier),
        ("token_classifier", token_classifier),
        ("text_embedder", text_embedder),
    )
}
