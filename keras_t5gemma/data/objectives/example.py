"""`Example`, the output of an objective, and its conversion to model inputs."""

import dataclasses
from typing import Any, Protocol

import numpy as np

from keras_t5gemma.config import BOS_ID, EOS_ID, PAD_ID


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One training example, before padding.

    An objective is anything with `encoder_length` (S), `decoder_length` (T) and `parts`: pairs of a part and its
    weight, a whole number. A part is called with ids [L], L at most its `raw_length`, and a `numpy.random.Generator`,
    and returns an `Example`. Its `closes_targets` says whether all its examples are complete; otherwise an `<eos>`
    among the ids marks the end of a text.

    Attributes:
        inputs: the ids that the encoder reads, 1-D int32.
        targets: the ids that the decoder learns to generate, 1-D int32, without `<bos>` and without a closing `<eos>`.
        complete: whether the targets are a complete answer, so that `<eos>` follows them.
    """

    inputs: np.ndarray
    targets: np.ndarray
    complete: bool


class Part(Protocol):
    """One task of an objective, such as a denoiser. `closes_targets` is optional, see `Example`."""

    # Any, because type checkers do not accept a `cached_property` where a protocol has an integer.
    @property
    def raw_length(self) -> Any:
        """The maximum number of ids of a call, an integer."""
        ...

    def __call__(self, ids: np.ndarray, rng: np.random.Generator, /) -> Example:
        """Makes an example of ids [L]."""
        ...


class Objective(Protocol):
    """An objective, the package's or a user's: see `Example`."""

    @property
    def encoder_length(self) -> int:
        """S."""
        ...

    @property
    def decoder_length(self) -> int:
        """T."""
        ...

    # Any for the same reason as `Part.raw_length`.
    @property
    def parts(self) -> Any:
        """A sequence of pairs of a `Part` and its weight, a whole number."""
        ...


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids that frame an example; by default Gemma's."""

    pad: int = PAD_ID
    eos: int = EOS_ID
    bos: int = BOS_ID

    @classmethod
    def of(cls, tokenizer: object) -> "SpecialIds":
        """A tokenizer's `pad_token_id`, `end_token_id` and `start_token_id`; Gemma's id if it lacks one."""
        names = {"pad": "pad_token_id", "eos": "end_token_id", "bos": "start_token_id"}
        ids = {field: getattr(tokenizer, name, None) for field, name in names.items()}
        return cls(**{field: int(value) for field, value in ids.items() if value is not None})


GEMMA_SPECIAL_IDS = SpecialIds()


def model_arrays(
    example: Example, encoder_length: int, decoder_length: int, special: SpecialIds = GEMMA_SPECIAL_IDS
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Converts an example to the model's inputs, labels and weights, padded on the right.

    >>> example = Example(inputs=np.array([51, 52, 7]), targets=np.array([7, 53]), complete=True)
    >>> x, y, sample_weight = model_arrays(example, encoder_length=4, decoder_length=5)

    gives

        encoder_token_ids       51 52  7  0
        encoder_padding_mask     1  1  1  0
        decoder_token_ids        2  7 53  0  0      <bos>, then the labels except the last
        decoder_padding_mask     1  1  1  0  0
        y                        7 53  1  0  0      <eos> closes complete targets
        sample_weight            1  1  1  0  0

    Args:
        example: an `Example`.
        encoder_length: S.
        decoder_length: T.
        special: a `SpecialIds`.

    Returns:
        `(x, y, sample_weight)`: a dict of int32 arrays [S] and [T], int32 [T], float32 [T].

    Raises:
        ValueError: if the example is longer than the arrays; nothing is ever trimmed.
    """
    labels = np.append(example.targets, special.eos) if example.complete else example.targets
    if len(example.inputs) > encoder_length or len(labels) > decoder_length:
        raise ValueError(
            f"An example with {len(example.inputs)} inputs and {len(labels)} labels does not fit encoder_length="
            f"{encoder_length} and decoder_length={decoder_length}. Give the objective at most its `raw_length` ids."
        )
    encoder_ids, encoder_mask = _padded(example.inputs, encoder_length, special.pad)
    y, decoder_mask = _padded(labels, decoder_length, special.pad)
    decoder_ids, _ = _padded(np.append(special.bos, labels[:-1]), decoder_length, special.pad)
    x = {
        "encoder_token_ids": encoder_ids,
        "encoder_padding_mask": encoder_mask,
        "decoder_token_ids": decoder_ids,
        "decoder_padding_mask": decoder_mask,
    }
    return x, y, decoder_mask.astype("float32")


def check_ids(ids: Any, raw_length: int, what: object) -> np.ndarray:
    """Checks raw ids, and converts them to an int32 array that can be split in two.

    Args:
        ids: [L].
        raw_length: the largest valid L.
        what: the objective that takes the ids, for the message.

    Returns:
        int32 [L].

    Raises:
        ValueError: if the ids are not 1-D integers, or there are fewer than two or more than `raw_length`.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"`ids` must be 1-D integers. Received: shape {array.shape}, dtype {array.dtype}.")
    if len(array) < 2:
        raise ValueError(
            f"`ids` needs at least 2 tokens, one for the inputs and one for the targets. Received: {len(array)}."
        )
    if len(array) > raw_length:
        raise ValueError(f"{what} takes at most raw_length={raw_length} ids. Received: {len(array)}.")
    return array.astype("int32")


def _padded(ids: np.ndarray, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    array, mask = np.full(length, pad, "int32"), np.zeros(length, "int32")
    array[: len(ids)], mask[: len(ids)] = ids, 1
    return array, mask
