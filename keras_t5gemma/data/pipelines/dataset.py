"""Texts to batches of examples: a Grain dataset that `fit` takes on every backend."""

import array
from functools import partial

import grain
import numpy as np

from keras_t5gemma.checks import integer
from keras_t5gemma.data.objectives.example import SpecialIds, model_arrays
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
    texts,
    tokenizer,
    objective,
    *,
    batch_size,
    seed=0,
    shuffle=True,
    num_epochs=None,
    documents="joined",
    pack=False,
    num_workers=0,
    shuffle_buffer=10_000,
    pack_buffer=1_024,
    drop_remainder=False,
):
    """Batches of examples for `fit`, from texts.

    The texts are joined to one stream of ids, `<eos>` after each, and the stream is cut into windows of as many ids as
    the objective takes (`raw_length`): a window begins and ends anywhere, short texts share one, and inputs fill the
    encoder, as in T5's pretraining. A mixture's denoisers are dealt like cards: once through the deck, each comes up
    exactly as often as its weight says, in random order, and takes its own length off the stream.

        stream      text one <eos> text two is longer <eos> three <eos> ...
        windows     [ denoiser 2 ][ denoiser 1       ][ denoiser 1     ] ...

    In an epoch each id is in exactly one window, but for the last ids, too few for another deal: they come up in
    other epochs, which start elsewhere in the stream, so that its windows are cut differently too. A stream too short
    for one deal is gone around more than once.

    Example i of epoch e is drawn from a generator seeded by (seed, e, i), whoever makes it and whenever: the number
    of threads or workers and a restart change nothing. The position is one number. `dataset[k:]` goes on after k
    batches, `dataset[i::n]` is process i's share of n, and a Grain iterator's `get_state` and `set_state` work.

        objective = PrefixLM(512, 512)
        data = pretraining_dataset(texts, tokenizer, objective, batch_size=8)
        held_out = pretraining_dataset(other, tokenizer, objective, batch_size=8, shuffle=False, num_epochs=1)
        model.fit(data, steps_per_epoch=1000, epochs=10, validation_data=held_out)

    Grain prepares up to 500 batches ahead, in threads. Where that is too much memory,
    `data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16))` is the same data for `fit`.

    Texts that are a Grain dataset, as `text_source` makes one of files, are read and tokenized as they are needed. The
    stream then goes on from one epoch into the next, example i of it is drawn by (seed, i), and the last window may be
    shorter.

    With `documents="whole"` no example holds parts of two texts: each text is one, padded, and a text longer than its
    part takes is several. `pack=True` puts several examples in a row, as many as fit; each sees itself alone, because
    the padding masks number them (see `packed_arrays`). Whole documents of mixed length fill 97% of the rows and more,
    counted on the side, encoder or decoder, that is fuller.

        data = pretraining_dataset(text_source("*.jsonl.zst"), tokenizer, objective, batch_size=8, documents="whole",
                                   pack=True, num_workers=4)

    Args:
        texts: strings, any iterable of them, or a Grain dataset of them; with `tokenizer=None`, of iterables of ids, or
            one 1-D integer array that is the whole stream (a `numpy.memmap` stays on disk). The strings of an iterable
            are tokenized here, once, and held as int32, unless `documents="whole"`, which holds the strings.
        tokenizer: anything that makes 1-D ids of a string when called. Its `pad_token_id`, `start_token_id` and
            `end_token_id` are used; Gemma's 0, 2 and 1 where it has none.
        objective: a `PrefixLM`, `UL2`, `SpanCorruption`, `Mixture` or your own, see `Example`.
        batch_size: B.
        seed: of the order and of the examples. Processes that read a share each may have their own.
        shuffle: whether an epoch's examples come in random order, another each epoch, or as they stand in the texts.
        num_epochs: how often to go through the texts; `None` for ever, which needs `steps_per_epoch` in `fit`.
        documents: "joined" to one stream, or each for itself, "whole".
        pack: whether several examples share a row.
        num_workers: processes that read and tokenize; 0 for none besides this one. Their number does not change the
            data. They start as Python's `multiprocessing` starts them: a script that asks for some keeps what it does
            under `if __name__ == "__main__":`. Texts in memory that are joined are tokenized here, and take none.
        shuffle_buffer: texts that are shuffled together where a Grain dataset has no random access.
        pack_buffer: examples that are looked at together to pack them: more fill rows better, and take more memory.
        drop_remainder: whether a last, smaller batch is left out, so that all have one shape and no other program is
            compiled.

    Returns:
        A Grain dataset of `(x, y, sample_weight)`: a dict of `encoder_token_ids` and `encoder_padding_mask`
        [B, S], `decoder_token_ids` and `decoder_padding_mask` [B, T]; labels [B, T]; all int32; weights [B, T],
        float32. A `grain.MapDataset`, whose length is the number of batches, for texts in memory that are joined and
        not packed, else a `grain.IterDataset`.

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
        examples = order.repeat(num_epochs).map_with_index(examples)
        if not pack:
            rows = examples.map(lambda example: model_arrays(example, *lengths, special))
            return rows.batch(batch_size, drop_remainder=drop_remainder)
        examples = examples.to_iter_dataset(READ_OPTIONS)
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
            examples = JoinedWindows(ids, objective, special.eos, seed)
        else:
            numbered = ids.map_with_index(lambda number, ids: (number, ids))
            examples = grain.experimental.FlatMapIterDataset(numbered, Pieces(objective, special.eos, seed))
    return batches(
        examples,
        lengths,
        special,
        batch_size=batch_size,
        seed=seed,
        pack=pack,
        pack_buffer=pack_buffer,
        drop_remainder=drop_remainder,
    )


class _Examples:
    """Any example of any epoch, by its number."""

    def __init__(self, stream, objective, seed):
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

    def __len__(self):
        return max(1, len(self.stream) // self.deal_length) * len(self.deck)

    def __call__(self, position, index):
        epoch = position // len(self)
        deal, place = divmod(index, len(self.deck))
        order = self.deck.order(epoch, deal)
        start = deal * self.deal_length + sum(part.raw_length for part in order[:place])
        ids = self._window(epoch, start, order[place].raw_length)
        return order[place](ids, generator(self.seed, EXAMPLE, epoch, index))

    def _window(self, epoch, start, length):
        """`length` ids of the stream taken as a circle, on which epochs start as far apart as they can."""
        golden_section = round(len(self.stream) * 0.6180339887)
        start = (start + epoch * golden_section) % len(self.stream)
        ids = self.stream[start : start + length]
        return np.concatenate([ids, self.stream[: length - len(ids)]])


def _token_stream(texts, tokenizer, eos):
    """All documents as one array of token ids, each document closed by `<eos>`."""
    if tokenizer is None and isinstance(texts, np.ndarray) and texts.ndim == 1 and texts.dtype.kind in "iu":
        return texts
    stream = array.array("i")
    for number, text in enumerate(texts):
        ids = _document_ids(text, tokenizer, f"`texts`[{number}]")
        stream.frombytes(ids.tobytes())
        # A tokenizer may have closed it already.
        if len(ids) and ids[-1] != eos:
            stream.append(eos)
    return np.frombuffer(stream, "int32")


def _document_ids(text, tokenizer, place="A text of `texts`"):
    if isinstance(text, str) != (tokenizer is not None):
        wanted = "a sequence of ids, since `tokenizer` is None" if tokenizer is None else "a string"
        raise ValueError(f"{place} must be {wanted}. Received: {text!r:.80}.")
    ids = np.asarray(tokenizer(text) if tokenizer else text)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{place} must give 1-D integer ids. Received: shape {ids.shape}, dtype {ids.dtype}.")
    return ids.astype("int32")
