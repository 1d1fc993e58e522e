"""The rows of files, with errors that show the row."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import grain

from keras_t5gemma.data.pipelines.streams import in_order
from keras_t5gemma.recipes.components import open_source
from keras_t5gemma.recipes.schema import Recipe


def training_rows(recipe: Recipe, names: Sequence[str], convert: Callable[[Mapping], Any]) -> grain.IterDataset:
    """The rows of [data] sources again and again, in another order each time.

    Args:
        recipe: a `Recipe`.
        names: the fields that each row must have.
        convert: a function of a row, which can be pickled. Its ValueErrors are raised with the row.
    """
    return _rows(recipe, recipe.data.sources, names, convert, shuffle=True, num_epochs=None)


def held_out_rows(recipe: Recipe, names: Sequence[str], convert: Callable[[Mapping], Any]) -> grain.IterDataset:
    """The rows of [data] validation, each once and in order. The arguments are those of `training_rows`."""
    return _rows(recipe, recipe.data.validation, names, convert, shuffle=False, num_epochs=1)


def _rows(recipe, paths, names, convert, **order) -> grain.IterDataset:
    return in_order(
        open_source(recipe, paths, 0),
        partial(_converted, names=tuple(names), convert=convert),
        seed=recipe.training.seed,
        shuffle_buffer=recipe.data.shuffle_buffer,
        num_workers=recipe.data.num_workers,
        **order,
    )


def _converted(row: Any, *, names: tuple[str, ...], convert: Callable[[Mapping], Any]) -> Any:
    try:
        if not isinstance(row, Mapping):
            raise ValueError("A row of a task must have fields, as in JSONL.")
        if missing := [name for name in names if name not in row]:
            raise ValueError(
                f"A row lacks {' and '.join(map(repr, missing))}; it has {', '.join(map(str, row))}. [task] "
                f"text_fields and label_field name the fields."
            )
        return convert(row)
    except ValueError as error:
        raise ValueError(f"{error} The row: {row!r:.200}") from error


def text(row: Mapping, name: str) -> str:
    """The text in a field of a row.

    Raises:
        ValueError: if the field has no text.
    """
    if not isinstance(row[name], str):
        raise ValueError(f"[task] text_fields: expected texts. Received: {row[name]!r:.80}.")
    return row[name]
