"""The held-out prompts of the section `[evaluation]` of a recipe. Needs no Keras."""

import itertools
from collections.abc import Iterator

from keras_t5gemma.data.pipelines.supervised import pairs_of_row
from keras_t5gemma.data.sources.open import text_source
from keras_t5gemma.recipes.schema import Recipe


def held_out_prompts(recipe: Recipe) -> list[tuple]:
    """Reads the pairs of `[evaluation] prompts`.

    Args:
        recipe: a `Recipe`.

    Returns:
        A list of (prompt, answer), at most `limit`; empty if the recipe has no prompts. A prompt is a text or a
        conversation.

    Raises:
        ValueError: if a file is missing or a row is of another form; the message names the key and the row.
    """
    if not recipe.evaluation.prompts:
        return []
    try:
        return list(itertools.islice(_pairs(recipe), recipe.evaluation.limit))
    except (ValueError, OSError) as error:
        raise ValueError(f"[evaluation] prompts: {error}") from error


def _pairs(recipe: Recipe) -> Iterator[tuple]:
    data = recipe.data
    for row in text_source(list(recipe.evaluation.prompts), field=None):
        try:
            pairs = pairs_of_row(row, data.pair_fields, data.answers)
            if wrong := [answer for _, answer in pairs if not isinstance(answer, str)]:
                raise ValueError(f"An answer must be a text. Received: {wrong[0]!r:.80}.")
        except ValueError as error:
            raise ValueError(
                f"{error} [data] pair_fields names the two fields, now {list(data.pair_fields)}. The row: {row!r:.200}"
            ) from error
        yield from pairs
