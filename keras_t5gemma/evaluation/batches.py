"""Requests of lm-evaluation-harness in batches: all continuations of a context together, long contexts first."""

import dataclasses
from collections.abc import Iterator, Sequence

from keras_t5gemma.evaluation.prompts import Prompt

# The decoder's rows per prompt of a batch, on average, at most. Each row has its own copy of the keys and values of
# cross-attention, so a context with more choices is encoded again for the rest.
ROWS_PER_PROMPT = 8


@dataclasses.dataclass
class Choices:
    """A prompt and the continuations that are scored after it.

    Attributes:
        prompt: a `Prompt`.
        indices: the numbers of the requests.
        targets: their continuations' ids.
    """

    prompt: Prompt
    indices: list[int] = dataclasses.field(default_factory=list)
    targets: list[tuple[int, ...]] = dataclasses.field(default_factory=list)


def choice_batches(pairs: Sequence[tuple[Prompt, tuple[int, ...]]], batch_size: int) -> Iterator[list[Choices]]:
    """Batches of prompts with all their continuations.

    Args:
        pairs: `(prompt, target)` per request.
        batch_size: the maximum number of prompts per batch.

    Yields:
        Lists of `Choices`. Each request is in one.
    """
    most_rows = ROWS_PER_PROMPT * batch_size
    groups: dict[Prompt, list[Choices]] = {}
    for index, (prompt, target) in enumerate(pairs):
        parts = groups.setdefault(prompt, [Choices(prompt)])
        if len(parts[-1].targets) == most_rows:
            parts.append(Choices(prompt))
        parts[-1].indices.append(index)
        parts[-1].targets.append(target)
    batch, rows = [], 0
    for choices in sorted((part for parts in groups.values() for part in parts), key=lambda x: -_size(x.prompt)):
        if batch and (len(batch) == batch_size or rows + len(choices.targets) > most_rows):
            yield batch
            batch, rows = [], 0
        batch.append(choices)
        rows += len(choices.targets)
    if batch:
        yield batch


def prompt_batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """The numbers of prompts, in batches, long prompts first.

    Args:
        prompts: a `Prompt` per request.
        batch_size: the maximum number of prompts per batch.

    Yields:
        Lists of integers.
    """
    order = sorted(range(len(prompts)), key=lambda i: -_size(prompts[i]))
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def _size(prompt: Prompt) -> int:
    return len(prompt.encoder) + len(prompt.start)
