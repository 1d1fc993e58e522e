"""Several sources of texts or rows as one, each in a share of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import grain

from keras_t5gemma.checks import integer, is_number
from keras_t5gemma.data.pipelines.streams import in_order
from keras_t5gemma.data.sources.rows import RowIterator, RowStream

_DATASETS = (grain.MapDataset, grain.IterDataset)


def mix_sources(
    sources: Sequence, weights: Sequence[float], *, seed: int = 0, shuffle: bool = True, shuffle_buffer: int = 10_000
) -> grain.IterDataset:
    """Mixes sources by weight, without end: each begins again, in a new order, when it has been read.

        texts = mix_sources([text_source("web/*.parquet"), text_source("books/*.jsonl.zst")], weights=[3, 1])
        data = pretraining_dataset(texts, tokenizer, objective, batch_size=8, shuffle=False)

        web     w0 w1 w2    w3 w4 w5    w6 ...       three of four texts
        books            b0          b1              one of four

    The order is determined by the weights and the seed. The position can be saved: that of each source. The result is
    shuffled already, so pass `shuffle=False` to what makes batches of it.

    Args:
        sources: two or more of what `pretraining_dataset` or `supervised_dataset` takes: Grain datasets such as
            `text_source` makes, or lists. All have elements of one form.
        weights: a positive number per source. Shares are of texts or rows, not of tokens.
        seed: seed of the order of each source.
        shuffle: whether each source is read in a random order, else in its own.
        shuffle_buffer: the number of texts that are shuffled together, for each source without random access.

    Returns:
        A `grain.IterDataset` of texts or rows. `fit` needs `steps_per_epoch`.

    Raises:
        ValueError: if a source is empty, or an argument is invalid.
    """
    sources, weights = list(sources), list(weights)
    if len(sources) < 2 or any(isinstance(source, (str, bytes)) for source in sources):
        raise ValueError(
            f"`sources` must hold two or more datasets or lists. For files, pass `text_source(...)` of each. Received: "
            f"{sources!r:.200}."
        )
    if len(weights) != len(sources) or not all(is_number(weight) and weight > 0 for weight in weights):
        raise ValueError(
            f"`weights` must hold a positive number for each of {len(sources)} sources. Received: {weights!r:.200}."
        )
    options: dict[str, Any] = {"shuffle": shuffle, "num_epochs": None, "shuffle_buffer": shuffle_buffer}
    seed = integer(seed, "seed", least=0)
    ordered = []
    for i, source in enumerate(sources):
        dataset = source if isinstance(source, _DATASETS) else grain.MapDataset.source(list(source))
        try:
            # Sources of one length must not be read in one order.
            ordered.append(in_order(dataset, _unchanged, seed=seed + i, num_workers=0, **options))
        except ValueError as error:
            raise ValueError(f"`sources`[{i}]: {error}") from error
    total = sum(weights)
    return MixedSources(grain.IterDataset.mix(ordered, [weight / total for weight in weights]))


class MixedSources(RowStream):
    """A mixture that Grain's workers share by the elements' numbers, so that their number does not change the order.

    Args:
        mixture: the elements.
    """

    def __init__(self, mixture: grain.IterDataset):
        super().__init__()
        self.mixture = mixture

    def __iter__(self) -> grain.DatasetIterator:
        return _MixedIterator(self)


class _MixedIterator(RowIterator):
    """Iterator of `MixedSources`. A worker reads the elements of all, and leaves those of the others out."""

    def __init__(self, rows: MixedSources):
        super().__init__(rows)
        self._elements = iter(rows.mixture)

    def next_row(self) -> Callable[[], Any]:
        element = next(self._elements)
        return lambda: element

    def get_position(self) -> dict:
        return {"mixture": self._elements.get_state()}

    def set_position(self, state: dict) -> None:
        self._elements.set_state(state["mixture"])


def _unchanged(element: Any) -> Any:
    return element
