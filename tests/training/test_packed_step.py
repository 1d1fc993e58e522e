"""A row packed from several examples trains as the examples do in rows of their own."""

import keras
import numpy as np
from helpers.one_step import assert_same_step, language_model, take_steps

SIDES = ("encoder", "decoder")
LENGTHS = ((9, 6), (4, 11), (6, 3))  # of the examples, longer than a window, encoder and decoder


def rows():
    """`(packed, alone)`, each an `(x, y, weights)`: all examples in one row, and one a row with padding."""
    generator = np.random.default_rng(2)
    packed, alone = {}, {}
    for side, lengths in zip(SIDES, zip(*LENGTHS, strict=True), strict=True):
        examples = [generator.integers(3, 99, length) for length in lengths]
        segments = [np.full(length, number) for number, length in enumerate(lengths, start=1)]
        for name, parts in (("token_ids", examples), ("padding_mask", segments)):
            packed[f"{side}_{name}"] = np.concatenate([*parts, np.zeros(2, int)])[None].astype("int32")
            padded = [np.pad(part, (0, 12 - len(part))) for part in parts]
            alone[f"{side}_{name}"] = np.stack(padded).astype("int32")
    alone = {name: x if "ids" in name else np.minimum(x, 1) for name, x in alone.items()}
    return tuple(
        (x, x["decoder_token_ids"] + 1, (x["decoder_padding_mask"] > 0).astype("float32")) for x in (packed, alone)
    )


def test_packed_rows_have_the_loss_and_the_gradients_of_their_examples_alone():
    # With this optimiser and rate, weights move by their gradients themselves.
    found = []
    for data in rows():
        lm = language_model(optimizer=keras.optimizers.SGD(1.0), num_layers=2)
        found.append(take_steps(lm, data))
    assert_same_step(*found)
