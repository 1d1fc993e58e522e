"""Held-out loss, overall and per denoiser."""

import itertools
from collections.abc import Callable, Iterable

from keras_t5gemma.data.objectives.span_corruption import SpanCorruption
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset


def mean_loss(model, batches: Iterable[tuple]) -> float:
    """Cross-entropy per target token, in nats, over all target tokens of some batches.

    Args:
        model: a compiled `keras.Model`.
        batches: an iterable of (x, y) or (x, y, sample_weight).
    """
    total = tokens = 0.0
    for x, y, *weight in batches:
        batch_tokens = float(weight[0].sum()) if weight else y.size
        loss = model.test_on_batch(x, y, *weight, return_dict=True)["loss"]
        model.reset_metrics()
        total += float(loss) * batch_tokens
        tokens += batch_tokens
    return total / tokens


def part_name(part) -> str:
    """The name of an objective's part in logs: "prefixlm", or mode, mean span and rate, as in "R_3_0.15"."""
    if isinstance(part, SpanCorruption):
        denoiser = part.denoiser
        numbers = [number for number in (denoiser.mean_span, denoiser.rate) if number is not None]
        return "_".join([denoiser.mode, *(f"{number:g}" for number in numbers)])
    return type(part).__name__.lower()


def held_out_by_part(
    texts, tokenizer, objective, *, num_batches: int, view: Callable | None = None, **options
) -> dict[str, tuple[list, float]]:
    """Held-out batches of the same texts for each part of an objective, for `TrainingLog`.

    >>> held_out = held_out_by_part(texts, tokenizer, UL2(512, 512), num_batches=8, batch_size=8)
    >>> list(held_out)
    ['R_3_0.15', 'R_8_0.15', 'X_3_0.5', 'X_8_0.5', 'X_64_0.15', 'X_64_0.5', 'S_0.25']

    Args:
        texts: as for `pretraining_dataset`.
        tokenizer: as for `pretraining_dataset`.
        objective: as for `pretraining_dataset`.
        num_batches: the maximum number of batches per part. They are created once, by this call, so that each
            evaluation uses the same batches.
        view: `(dataset, part) -> dataset`, which replaces each part's dataset, e.g. by a `distillation_dataset`; or
            None.
        **options: options of `pretraining_dataset`: `batch_size`, `seed`, `documents`, `pack`, ...

    Returns:
        `{name: (batches, weight)}`, a list of batches and the part's weight in the objective.

    Raises:
        ValueError: if the texts do not fill a batch.
    """
    held_out = {}
    for part, weight in objective.parts:
        name = part_name(part)
        if name in held_out:  # e.g. the same denoiser with other lengths
            name = f"{name}_{len(held_out) + 1}"
        data = pretraining_dataset(texts, tokenizer, part, shuffle=False, num_epochs=1, **options)
        held_out[name] = first_batches(view(data, part) if view else data, num_batches), weight
    return held_out


def first_batches(data: Iterable, count: int) -> list:
    """The first batches of a dataset.

    Raises:
        ValueError: if the dataset has no batch.
    """
    batches = list(itertools.islice(iter(data), count))
    if not batches:
        raise ValueError("The held-out texts do not fill one batch. Use more of them, or a smaller `batch_size`.")
    return batches
