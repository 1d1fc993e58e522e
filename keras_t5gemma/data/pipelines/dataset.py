"""Texts to batches of examples: a Grain dataset that `fit` takes on every backend."""

import array
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import grain
import numpy as np

from keras_t5gemma.checks import integer
from keras_t5gemma.data.objectives.example import Example, Objective, SpecialIds, model_arrays
from keras_t5gemma.data.pipelines.streams import (
    EXAMPLE,
    READ_OPTIONS,
    Deck,
    JoinedWindows,
    Pieces,
    batches,
    generator,
    in_order,
)
from keras_t5gemma.suggestions import check_choice


def pretraining_dataset(
    texts: Iterable,
    tokenizer: Callable | None,
    objective: Objective,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    documents: str = "joined",
    pack: bool = False,
    num_workers: int = 0,
    shuffle_buffer: int = 10_000,
    pack_buffer: int = 1_024,
    drop_remainder: bool = False,
) -> grain.MapDataset | grain.IterDataset:
    """Makes batches of examples for `fit` from texts.

    The texts are joined to one stream of ids, with `<eos>` after each text, and the stream is cut into windows of as
    many ids as the objective takes (`raw_length`). A window begins and ends anywhere, short texts share one, and inputs
    fill the encoder, as in T5's pretraining. A mixture's denoisers are dealt like cards: once through the deck, each
    denoiser comes up exactly as often as its weight says, in random order, and takes its own length off the stream.

        stream      text one <eos> text two is longer <eos> three <eos> ...
        windows     [ denoiser 2 ][ denoiser 1       ][ denoiser 1     ] ...

    In an epoch each id is in exactly one window, except the last ids, which are too few for another deal. They come up
    in other epochs, which start elsewhere in the stream and so cut it differently. If a stream is too short for one
    deal, an epoch goes around it more than once.

    Example i of epoch e is drawn from a generator seeded by (seed, e, i). So the number of threads or workers and a
    restart change nothing. The position is one number: `dataset[k:]` continues after k batches, `dataset[i::n]` is
    process i's share of n, and a Grain iterator's `get_state` and `set_state` work.

        objective = PrefixLM(512, 512)
        data = pretraining_dataset(texts, tokenizer, objective, batch_size=8)
        held_out = pretraining_dataset(other, tokenizer, objective, batch_size=8, shuffle=False, num_epochs=1)
        model.fit(data, steps_per_epoch=1000, epochs=10, validation_data=held_out)

    Grain prepares up to 500 batches ahead, in threads. If that takes too much memory,
    `data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16))` is the same data for `fit`.

    Texts in a Grain dataset, such as `text_source` makes from files, are read and tokenized when they are needed. The
    stream then continues from one epoch into the next, its example i is drawn by (seed, i), and the last window may be
    shorter.

    With `documents="whole"` no example holds parts of two texts: each text is one padded example, or several if it is
    too long for its part. `pack=True` puts as many examples into a row as fit. Each example sees only itself, because
    the padding masks number them (see `packed_arrays`). Whole documents of mixed length fill 97% of the rows or more,
    counted on the fuller side, encoder or decoder.

        data = pretraining_dataset(text_source("*.jsonl.zst"), tokenizer, objective, batch_size=8, documents="whole",
                                   pack=True, num_workers=4)

    Args:
        texts: an iterable or a Grain dataset of strings. With `tokenizer=None`, of sequences of ids, or one 1-D integer
            array that is the whole stream (a `numpy.memmap` stays on disk). The strings of an iterable are tokenized
            here, once, and held as int32, unless `documents="whole"`, which holds the strings.
        tokenizer: a function of a string that returns 1-D ids. Its `pad_token_id`, `start_token_id` and `end_token_id`
            are used, or Gemma's 0, 2 and 1 if it has none.
        objective: a `PrefixLM`, `UL2`, `SpanCorruption`, `Mixture` or your own, see `Example`.
        batch_size: B.
        seed: seed of the order and of the examples. Processes that each read a share may have seeds of their own.
        shuffle: whether examples come in a random order, which differs between epochs, or in the order of the texts.
        num_epochs: number of passes over the texts; `None` for endless data, which needs `steps_per_epoch` in `fit`.
        documents: "joined" to one stream, or "whole" for examples of single texts.
        pack: whether several examples share a row.
        num_workers: processes that read and tokenize; 0 to use only this process. Their number does not change the
            data. Python's `multiprocessing` starts them, so a script that uses workers needs
            `if __name__ == "__main__":`. Joined texts in memory are tokenized here, and cannot use workers.
        shuffle_buffer: number of texts that are shuffled together if a Grain dataset has no random access.
        pack_buffer: number of examples that are packed together. More of them fill rows better and take more memory.
        drop_remainder: whether a last, smaller batch is left out, so that all batches have one shape and no second
            program is compiled.

    Returns:
        A Grain dataset of `(x, y, sample_weight)`: a dict of `encoder_token_ids` and `encoder_padding_mask`
        [B, S], `decoder_token_ids` and `decoder_padding_mask` [B, T]; labels [B, T]; all int32; weights [B, T],
        float32. For joined texts in memory that are not packed it is a `grain.MapDataset`, whose length is the number
        of batches, else a `grain.IterDataset`.

    Raises:
        ValueError: if an argument is out of range, a text is not a string, or the texts are too short for one window
            or one batch.
    """
    batch_size = integer(batch_size, "batch_size")
    seed = integer(seed, "seed", least=0)
    num_epochs = integer(num_epochs, "num_epochs", optional=True)
    check_choice(documents, "documents", ("joined", "whole"))
    if isinstance(texts, (str, bytes)):
        raise ValueError(
            "`texts` must be a list or another iterable of strings, not a single string. To read files, pass "
            "`text_source(paths)`."
        )
    special = SpecialIds.of(tokenizer)
    lengths = objective.encoder_length, objective.decoder_length
    is_dataset = isinstance(texts, (grain.MapDataset, grain.IterDataset))
    if documents == "joined" and not is_dataset:
        if num_workers:
            raise ValueError(
                f"`num_workers` must be 0 for texts in memory that are joined: they are tokenized here, once. "
                f"Received: num_workers={num_workers}. Workers read a Grain dataset, such as `text_source(texts)`."
            )
        examples = _Examples(_token_stream(texts, tokenizer, special.eos), objective, seed)
        if num_epochs is not None and drop_remainder and not pack and len(examples) * num_epochs < batch_size:
            raise ValueError(
                f"The texts make {len(examples)} examples, so {num_epochs} epochs do not fill one batch of batch_size="
                f"{batch_size}. Use a smaller batch, shorter lengths or more text."
            )
        order = grain.MapDataset.range(len(examples))
        if shuffle:
            order = order.shuffle(seed=seed % 2**32)
        example_dataset = order.repeat(num_epochs).map_with_index(examples)
        if not pack:
            rows = example_dataset.map(lambda example: model_arrays(example, *lengths, special))
            return rows.batch(batch_size, drop_remainder=drop_remainder)
        example_dataset = example_dataset.to_iter_dataset(READ_OPTIONS)
    else:
        if isinstance(texts, np.ndarray) and texts.ndim == 1 and texts.dtype.kind in "iu":
            raise ValueError('`texts` is one stream of ids, which `documents="whole"` cannot take apart.')
        ids = in_order(
            texts if is_dataset else grain.MapDataset.source(list(texts)),
            partial(_document_ids, tokenizer=tokenizer),
            seed=seed,
            shuffle=shuffle,
            num_epochs=num_epochs,
            shuffle_buffer=shuffle_buffer,
            num_workers=num_workers,
        )
        if documents == "joined":
            example_dataset = JoinedWindows(ids, objective, special.eos, seed)
        else:
            numbered = ids.map_with_index(lambda number, ids: (number, ids))
            example_dataset = grain.experimental.FlatMapIterDataset(numbered, Pieces(objective, special.eos, seed))
    return batches(
        example_dataset,
        lengths,
        special,
        batch_size=batch_size,
        seed=seed,
        pack=pack,
        pack_buffer=pack_buffer,
        drop_remainder=drop_remainder,
    )


class _Examples:
    """The examples of a joined stream, with random access by epoch and index."""

    def __init__(self, stream: np.ndarray, objective: Objective, seed: int):
        self.stream = stream
        self.seed = seed
        self.deck = Deck(objective, seed)
        lengths = [part.raw_length for part in self.deck.parts]
        self.deal_length = sum(lengths)
        if len(stream) < max(lengths):
            raise ValueError(
                f"The texts have {len(stream)} tokens, fewer than the {max(lengths)} one example takes with "
                f"encoder_length={objective.encoder_length} and decoder_length={objective.decoder_length}. Use shorter "
                f"lengths or more text."
            )

    def __len__(self) -> int:
        return max(1, len(self.stream) // self.deal_length) * len(self.deck)

    def __call__(self, position: int, index: int) -> Example:
        """Makes the example with an index in its epoch; `position` counts the examples of all epochs."""
        epoch = position // len(self)
        deal, place = divmod(index, len(self.deck))
        order = self.deck.order(epoch, deal)
        start = deal * self.deal_length + sum(part.raw_length for part in order[:place])
        ids = self._window(epoch, start, order[place].raw_length)
        return order[place](ids, generator(self.seed, EXAMPLE, epoch, index))

    def _window(self, epoch: int, start: int, length: int) -> np.ndarray:
        """A window of the stream, which is a circle here. The epochs start as far apart on it as possible."""
        golden_section = round(len(self.stream) * 0.6180339887)
        start = (start + epoch * golden_section) % len(self.stream)
        ids = self.stream[start : start + length]
        return np.concatenate([ids, self.stream[: length - len(ids)]])


def _token_stream(texts: Iterable, tokenizer: Callable | None, eos: int) -> np.ndarray:
    """All documents as one array of token ids, with `<eos>` after each document."""
    if tokenizer is None and isinstance(texts, np.ndarray) and texts.ndim == 1 and texts.dtype.kind in "iu":
        return texts
    stream = array.array("i")
    for number, text in enumerate(texts):
        ids = _document_ids(text, tokenizer, f"`texts`[{number}]")
        stream.frombytes(ids.tobytes())
        # Some tokenizers add <eos> themselves.
        if len(ids) and ids[-1] != eos:
            stream.append(eos)
    return np.frombuffer(stream, "int32")


def _document_ids(text: Any, tokenizer: Callable | None, place: str = "A text of `texts`") -> np.ndarray:
    """Checks and tokenizes a document: int32 [L]. `place` names the document, for the message."""
    if isinstance(text, str) != (tokenizer is not None):
        expected = "a sequence of ids, since `tokenizer` is None" if tokenizer is None else "a string"
        raise ValueError(f"{place} must be {expected}. Received: {text!r:.80}.")
    ids = np.asarray(tokenizer(text) if tokenizer else text)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{place} must give 1-D integer ids. Received: shape {ids.shape}, dtype {ids.dtype}.")
    return ids.astype("int32")
