"""Packs several examples into one row: rows are full, and each example sees only itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_t5gemma.data.objectives.example import GEMMA_SPECIAL_IDS, Example, SpecialIds


def pack(lengths: Any, capacity: tuple[int, int]) -> list[np.ndarray]:
    """Assigns examples to rows.

    The largest remaining example opens a row. While an example fits, the row gets the one whose direction is closest to
    that of the remaining room (the dot-product rule of vector bin packing, Panigrahy et al. 2011). So examples with
    many encoder tokens share rows with examples with many decoder tokens.

    >>> pack([(3, 1), (2, 2), (5, 1), (1, 1)], capacity=(6, 3))
    [array([2, 3]), array([1, 0])]

    Args:
        lengths: [N, 2], the encoder and decoder places of each example, at least 1 of each.
        capacity: `(S, T)`.

    Returns:
        A list of int arrays: the examples of each row. Each example is in exactly one row.

    Raises:
        ValueError: if an example is longer than a row.
    """
    sizes = np.asarray(lengths, float).reshape(-1, 2) / capacity
    if (sizes > 1).any():
        longest = int(sizes.max(axis=1).argmax())
        raise ValueError(
            f"Examples must fit a row of (encoder_length, decoder_length)={tuple(capacity)}. Received: lengths "
            f"{tuple(int(length) for length in lengths[longest])} of example {longest}."
        )
    # Largest first. A stable sort, so that the result is the same on all platforms.
    remaining = np.argsort(-sizes.max(axis=1), kind="stable")
    encoder, decoder = sizes[remaining].T.copy()
    rows = []
    while len(remaining):
        row, room, fits = [], np.ones(2), np.arange(len(remaining))
        best = 0
        while True:
            row.append(best)
            room -= encoder[best], decoder[best]
            # An example that does not fit now never will in this row, so the candidates only become fewer. The
            # tolerance covers the divisions above. It is less than a token, 1 / S, for every practical length.
            fits = fits[(encoder[fits] <= room[0] + 1e-9) & (decoder[fits] <= room[1] + 1e-9) & (fits != best)]
            if not len(fits):
                break
            best = int(fits[np.argmax(encoder[fits] * room[0] + decoder[fits] * room[1])])
        rows.append(remaining[row])
        unused = np.ones(len(remaining), bool)
        unused[row] = False
        remaining, encoder, decoder = remaining[unused], encoder[unused], decoder[unused]
    return rows


def packed_arrays(
    examples: Sequence[Example],
    encoder_length: int,
    decoder_length: int,
    special: SpecialIds = GEMMA_SPECIAL_IDS,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Packs examples into one row of the model's inputs, labels and weights.

    A padding mask holds segment ids: the k-th example has k in both masks, and padding has 0. A position sees only its
    own segment, in self- and in cross-attention. Each decoder segment starts from its own `<bos>`, and its labels are
    from the same segment.

    >>> first = Example(np.array([51, 52]), np.array([61]), complete=True)
    >>> second = Example(np.array([53]), np.array([62, 63]), complete=True)
    >>> x, y, sample_weight = packed_arrays([first, second], encoder_length=4, decoder_length=6)

    gives

        encoder_token_ids       51 52 53  0
        encoder_padding_mask     1  1  2  0
        decoder_token_ids        2 61  2 62 63  0
        decoder_padding_mask     1  1  2  2  2  0
        y                       61  1 62 63  1  0
        sample_weight            1  1  1  1  1  0

    Args:
        examples: `Example`s, at least one.
        encoder_length: S.
        decoder_length: T.
        special: a `SpecialIds`.

    Returns:
        `(x, y, sample_weight)`: a dict of int32 arrays [S] and [T], int32 [T], float32 [T].

    Raises:
        ValueError: if the examples do not fit into the row; nothing is ever trimmed.
    """
    inputs = [example.inputs for example in examples]
    labels = [np.append(example.targets, special.eos) if example.complete else example.targets for example in examples]
    input_lengths, label_lengths = [len(ids) for ids in inputs], [len(ids) for ids in labels]
    if sum(input_lengths) > encoder_length or sum(label_lengths) > decoder_length:
        raise ValueError(
            f"{len(examples)} example(s) with {sum(input_lengths)} inputs and {sum(label_lengths)} labels do not fit "
            f"encoder_length={encoder_length} and decoder_length={decoder_length}. Give an objective at most its "
            f"`raw_length` ids, and a row no more examples than fit."
        )
    segments = np.arange(1, len(examples) + 1)
    y = _padded(np.concatenate(labels), decoder_length, special.pad)
    # The labels, shifted by one to the right, with <bos> at the start of each segment.
    decoder_ids = np.full(decoder_length, special.pad, "int32")
    count = sum(label_lengths)
    decoder_ids[1:count] = y[: count - 1]
    decoder_ids[np.cumsum([0, *label_lengths[:-1]])] = special.bos
    decoder_mask = _padded(np.repeat(segments, label_lengths), decoder_length, 0)
    x = {
        "encoder_token_ids": _padded(np.concatenate(inputs), encoder_length, special.pad),
        "encoder_padding_mask": _padded(np.repeat(segments, input_lengths), encoder_length, 0),
        "decoder_token_ids": decoder_ids,
        "decoder_padding_mask": decoder_mask,
    }
    return x, y, (decoder_mask > 0).astype("float32")


def example_lengths(example: Example) -> tuple[int, int]:
    """Numbers of inputs and labels of an `Example`: its encoder and decoder places in a row."""
    return len(example.inputs), len(example.targets) + example.complete


def _padded(ids: np.ndarray, length: int, pad: int) -> np.ndarray:
    array = np.full(length, pad, "int32")
    array[: len(ids)] = ids
    return array
