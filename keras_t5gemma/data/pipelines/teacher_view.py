"""The tokens that a decoder-only teacher reads for a batch, and the positions at which it predicts labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from keras_t5gemma.data.objectives.example import Objective, SpecialIds

# Names of the arrays that replace the labels in a `distillation_dataset`.
LABELS, TOKEN_IDS, PADDING_MASK, POSITIONS = "labels", "teacher_token_ids", "teacher_padding_mask", "teacher_positions"


def distillation_dataset(
    data: grain.MapDataset | grain.IterDataset,
    objective: Objective | None = None,
    tokenizer: object = None,
) -> grain.MapDataset | grain.IterDataset:
    """Adds the teacher's view to batches, for a model compiled with `Distillation`.

        data = pretraining_dataset(texts, tokenizer, objective, batch_size=8)
        lm.compile(loss=Distillation(teacher))
        lm.fit(distillation_dataset(data, objective, tokenizer), steps_per_epoch=1000)

    A teacher reads the original text of inputs and targets, after `<bos>`, so that its logits for a token are at the
    previous position. For PrefixLM and pairs, the targets follow the inputs. For span corruption, the spans return to
    their places in the text:

        inputs      51 52  7 55                     labels       7 53 54  1
        teacher      2 51 52 53 54 55               positions   -1  2  3 -1

    Sentinels, a closing `<eos>` and mode tokens are not text: as labels they have position -1, like padding. An example
    whose text holds sentinels of its own cannot be restored, so all its labels have position -1.

    Args:
        data: a Grain dataset of batches `(x, y, sample_weight)`, such as `pretraining_dataset` and `supervised_dataset`
            make. It must not be packed, because a causal teacher would see one example from the next.
        objective: the objective of the examples, for its sentinels and mode tokens; None for pairs.
        tokenizer: as for `pretraining_dataset`. Its start and pad ids are used, or Gemma's if it is None.

    Returns:
        The same kind of dataset, with y a dict of int32 arrays: `labels` [B, T]; `teacher_token_ids` and
        `teacher_padding_mask` [B, S + T]; `teacher_positions` [B, T].

    Raises:
        ValueError: if `data` is not a Grain dataset; and while it is read, if a batch is packed or has another form.
    """
    if not isinstance(data, (grain.MapDataset, grain.IterDataset)):
        raise ValueError(
            f"`data` must be a Grain dataset of batches, such as `pretraining_dataset` makes. Received: "
            f"{type(data).__name__}."
        )
    return data.map(TeacherView(objective, SpecialIds.of(tokenizer)))


class TeacherView:
    """Adds the teacher's view to a batch: see `distillation_dataset`.

    Args:
        objective: the objective of the examples, or None.
        special: a `SpecialIds`.
    """

    def __init__(self, objective: Objective | None, special: SpecialIds):
        parts: list[Any] = [part for part, _ in objective.parts] if objective is not None else []
        self._special = special
        self._mode_tokens = {token for part in parts if (token := getattr(part, "mode_token", None)) is not None}
        # The distinct sequences of sentinels, in order: most denoisers share one.
        self._sentinels = tuple({tuple(part.sentinels): None for part in parts if hasattr(part, "sentinels")})

    def __call__(self, batch: tuple) -> tuple:
        """Converts `(x, labels, sample_weight)` to `(x, y, sample_weight)`, with y as in `distillation_dataset`."""
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
            # Each decoder position predicts one label, so there are as many labels as positions.
            places = np.flatnonzero(x["decoder_padding_mask"][row] > 0)
            text, text_positions = self._text(inputs, labels[row][places])
            # The last token need not be read: it predicts no label.
            text = text[: shape[1] - 1]
            token_ids[row, 1 : len(text) + 1], mask[row, 1 : len(text) + 1] = text, 1
            positions[row, places] = text_positions
        positions[weights == 0] = -1
        y = {LABELS: labels, TOKEN_IDS: token_ids, PADDING_MASK: mask, POSITIONS: positions}
        return x, y, weights

    def _text(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The original text of an example, int [L], and the index of each label in it, -1 if it is not text."""
        for sentinels in self._sentinels:
            if len(labels) and labels[0] == sentinels[0]:
                restored = _restored(inputs, labels, sentinels)
                return (inputs, np.full(len(labels), -1)) if restored is None else restored
        return np.concatenate([inputs, labels]), np.arange(len(inputs), len(inputs) + len(labels))


def _restored(inputs: np.ndarray, labels: np.ndarray, sentinels: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Undoes span corruption.

    Args:
        inputs: int [number of inputs], with sentinels.
        labels: int [number of labels], with sentinels and a closing `<eos>`.
        sentinels: the denoiser's.

    Returns:
        The text and the positions, as for `TeacherView._text`. None if the sentinels are not the same in inputs and
        labels, each once and in order.
    """
    targets = labels[:-1]  # without the closing <eos>, which ends the targets but not a text
    holes, starts = np.flatnonzero(np.isin(inputs, sentinels)), np.flatnonzero(np.isin(targets, sentinels))
    used = np.asarray(sentinels[: len(holes)])
    if not (np.array_equal(inputs[holes], used) and np.array_equal(targets[starts], used)):
        return None
    # Each piece of the inputs up to a hole, and then the span in the targets that fills the hole.
    ends = np.append(starts[1:], len(targets))
    positions = np.full(len(labels), -1)
    pieces, begin, length = [], 0, 0
    for hole, start, end in zip(holes, starts, ends, strict=True):
        pieces += [inputs[begin:hole], targets[start + 1 : end]]
        length += hole - begin
        positions[start + 1 : end] = np.arange(length, length + end - start - 1)
        length += end - start - 1
        begin = hole + 1
    return np.concatenate([*pieces, inputs[begin:]]), positions


def _checked(batch: Any) -> tuple[Mapping[str, np.ndarray], np.ndarray, np.ndarray]:
    """`(x, labels, weights)` of a batch, once it is checked that a teacher can read it."""
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


def _kinds(batch: object) -> str:
    return f"({', '.join(type(part).__name__ for part in batch)})" if isinstance(batch, tuple) else type(batch).__name__
