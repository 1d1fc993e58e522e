"""The tokens that a decoder-only teacher reads for a batch, and where in them it predicts each label."""

from collections.abc import Mapping

import grain
import numpy as np

from keras_t5gemma.data.objectives.example import SpecialIds

# The names of what `distillation_dataset` puts in the place of the labels.
LABELS, TOKEN_IDS, PADDING_MASK, POSITIONS = "labels", "teacher_token_ids", "teacher_padding_mask", "teacher_positions"


def distillation_dataset(data, objective=None, tokenizer=None):
    """Batches with the teacher's view of them, for a model compiled with `Distillation`.

        data = pretraining_dataset(texts, tokenizer, objective, batch_size=8)
        lm.compile(loss=Distillation(teacher))
        lm.fit(distillation_dataset(data, objective, tokenizer), steps_per_epoch=1000)

    A teacher reads inputs and targets as the one text they were, after `<bos>`, so that its logits at a token's
    predecessor are those for the token. PrefixLM and pairs are put one behind the other; with span corruption the spans
    go back to where they were cut out:

        inputs      51 52  7 55                     labels       7 53 54  1
        teacher      2 51 52 53 54 55               positions   -1  2  3 -1

    Sentinels, a closing `<eos>` and mode tokens are no text: they have position -1 where they are labels, and padding
    has, too. So has an example that cannot be put together again because its text holds sentinels of its own.

    Args:
        data: a Grain dataset of batches `(x, y, sample_weight)`, as `pretraining_dataset` and `supervised_dataset`
            make them, not packed: a causal teacher would see one example from the next.
        objective: what made the examples, for its sentinels and mode tokens; None for pairs.
        tokenizer: as for `pretraining_dataset`, whose start and pad ids are used; Gemma's where None.

    Returns:
        The same kind of dataset, with y a dict of int32 arrays: `labels` [B, T]; `teacher_token_ids` and
        `teacher_padding_mask` [B, S + T]; `teacher_positions` [B, T].

    Raises:
        ValueError: where `data` is no such dataset; and, when it is read, where a batch is packed or something else.
    """
    if not isinstance(data, (grain.MapDataset, grain.IterDataset)):
        raise ValueError(
            f"`data` must be a Grain dataset of batches, such as `pretraining_dataset` makes. Received: "
            f"{type(data).__name__}."
        )
    return data.map(TeacherView(objective, SpecialIds.of(tokenizer)))


class TeacherView:
    """Batches to batches with the teacher's view: see `distillation_dataset`.

    Args:
        objective: what made the examples, or None.
        special: a `SpecialIds`.
    """

    def __init__(self, objective, special):
        parts = [part for part, _ in objective.parts] if objective is not None else []
        self._special = special
        self._mode_tokens = {token for part in parts if (token := getattr(part, "mode_token", None)) is not None}
        # Denoisers mostly share theirs.
        self._sentinels = tuple({tuple(part.sentinels): None for part in parts if hasattr(part, "sentinels")})

    def __call__(self, batch):
        """`(x, labels, sample_weight)` of arrays to `(x, y, sample_weight)`."""
        x, labels, weights = _checked(batch)
        batch_size, length = labels.shape
        shape = batch_size, x["encoder_token_ids"].shape[1] + length
        token_ids, mask = np.full(shape, self._special.pad, "int32"), np.zeros(shape, "int32")
        positions = np.full(labels.shape, -1, "int32")
        token_ids[:, 0], mask[:, 0] = self._special.bos, 1
        for row in range(batch_size):
            inputs = x["encoder_token_ids"][row][x["encoder_padding_mask"][row] > 0]
            if len(inputs) and inputs[0] in self._mode_tokens:
                inputs = inputs[1:]
            # A decoder position reads one label and says the next: as many labels as positions.
            places = np.flatnonzero(x["decoder_padding_mask"][row] > 0)
            text, where = self._text(inputs, labels[row][places])
            # What stands last need not be read.
            text = text[: shape[1] - 1]
            token_ids[row, 1 : len(text) + 1], mask[row, 1 : len(text) + 1] = text, 1
            positions[row, places] = where
        positions[weights == 0] = -1
        y = {LABELS: labels, TOKEN_IDS: token_ids, PADDING_MASK: mask, POSITIONS: positions}
        return x, y, weights

    def _text(self, inputs, labels):
        """The text an example was made of, int [L], and each label's place in it, -1 for none."""
        for sentinels in self._sentinels:
            if len(labels) and labels[0] == sentinels[0]:
                found = _rebuilt(inputs, labels, sentinels)
                return (inputs, np.full(len(labels), -1)) if found is None else found
        return np.concatenate([inputs, labels]), np.arange(len(inputs), len(inputs) + len(labels))


def _rebuilt(inputs, labels, sentinels):
    """`_text` of span corruption; None where sentinels do not stand in inputs and labels alike, once and in order."""
    targets = labels[:-1]  # without the closing <eos>: where the window ends, no text does
    holes, starts = np.flatnonzero(np.isin(inputs, sentinels)), np.flatnonzero(np.isin(targets, sentinels))
    used = np.asarray(sentinels[: len(holes)])
    if not (np.array_equal(inputs[holes], used) and np.array_equal(targets[starts], used)):
        return None
    # Each piece of the inputs up to a hole, then the span that the targets have for it.
    ends = np.append(starts[1:], len(targets))
    where = np.full(len(labels), -1)
    pieces, begin, length = [], 0, 0
    for hole, start, end in zip(holes, starts, ends, strict=True):
        pieces += [inputs[begin:hole], targets[start + 1 : end]]
        length += hole - begin
        where[start + 1 : end] = np.arange(length, length + end - start - 1)
        length += end - start - 1
        begin = hole + 1
    return np.concatenate([*pieces, inputs[begin:]]), where


def _checked(batch):
    if not (isinstance(batch, tuple) and len(batch) == 3 and isinstance(batch[0], Mapping)):
        raise ValueError(
            f"`data` must hold batches `(x, y, sample_weight)` with a dict of token ids as x, as `pretraining_dataset` "
            f"makes them. Received: {_kinds(batch)}."
        )
    x, labels, weights = batch
    names = [f"{stack}_{what}" for stack in ("encoder", "decoder") for what in ("token_ids", "padding_mask")]
    if missing := [name for name in names if name not in x]:
        raise ValueError(f"`data` must hold batches of token ids. Received: x without {', '.join(missing)}.")
    if isinstance(labels, Mapping):
        raise ValueError(
            f"`data` must hold batches with labels [B, T], and these have more already. Received: y with "
            f"{', '.join(labels)}."
        )
    if any(np.max(x[name], initial=0) > 1 for name in names if name.endswith("mask")):
        raise ValueError(
            "`data` is packed: several examples share a row, and a causal teacher would see one from the next. Make it "
            "with pack=False to distil."
        )
    return x, np.asarray(labels, "int32"), np.asarray(weights)


def _kinds(batch):
    return f"({', '.join(type(part).__name__ for part in batch)})" if isinstance(batch, tuple) else type(batch).__name__
