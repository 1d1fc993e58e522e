"""`encode`: prompts that the encoder has read already, for any number of calls."""

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_t5gemma._keras_internals import tensor_of
from keras_t5gemma.checks import is_integer
from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.arrays import prompt_arrays
from keras_t5gemma.inference.buckets import rounded_for
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.suggestions import check_choice
from keras_t5gemma.text.cuts import cuts_reported


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EncodedPrompts:
    """Prompts with the encoder's output, from `T5GemmaSeq2SeqLM.encode`.

    `len` is their number. An index gives a single prompt; a slice or a list of integers gives several.

    Attributes:
        encoder_output: a tensor [B, S, E] on the model's device.
        encoder_token_ids: int32 [B, S].
        encoder_padding_mask: int32 [B, S].
        decoder_token_ids: int32 [B, T], the decoder prompts.
        decoder_padding_mask: int32 [B, T].
        is_single: whether results are without B, because there was one prompt, outside of a list.
        backbone: a weak reference to the backbone that encoded them.
    """

    encoder_output: Any
    encoder_token_ids: np.ndarray
    encoder_padding_mask: np.ndarray
    decoder_token_ids: np.ndarray
    decoder_padding_mask: np.ndarray
    is_single: bool
    backbone: weakref.ref

    def __len__(self):
        return len(self.encoder_token_ids)

    def __repr__(self):
        rows, length = self.encoder_token_ids.shape
        return f"EncodedPrompts({rows} prompt{'s' * (rows != 1)} of up to {length} tokens)"

    def __getitem__(self, rows: int | slice | Sequence[int]) -> "EncodedPrompts":
        is_single = is_integer(rows)
        chosen = np.arange(len(self))[[rows] if is_single else rows]
        if not chosen.size:
            raise ValueError(f"No prompt is left of {len(self)}. Received: rows {rows!r}.")
        # Columns that are padding in the chosen rows are left out, as for prompts that are not encoded.
        (used,) = np.nonzero(self.encoder_padding_mask[chosen].any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        return dataclasses.replace(
            self,
            encoder_output=ops.take(self.encoder_output, tensor_of(chosen.astype("int32")), axis=0)[:, columns],
            encoder_token_ids=self.encoder_token_ids[chosen, columns],
            encoder_padding_mask=self.encoder_padding_mask[chosen, columns],
            decoder_token_ids=self.decoder_token_ids[chosen],
            decoder_padding_mask=self.decoder_padding_mask[chosen],
            is_single=is_single,
        )

    def inputs(self) -> dict[str, Any]:
        """The prompts as `prompt_arrays` takes them; ids and masks without B if `is_single`."""
        names = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")
        arrays = {name: getattr(self, name) for name in names}
        if self.is_single:
            arrays = {name: x[0] for name, x in arrays.items()}
        return {**arrays, "encoder_output": self.encoder_output}


def encode(lm, inputs, *, truncate: str | None = None) -> EncodedPrompts:
    """Encodes prompts once, for any number of calls.

    `generate`, `stream` and `score` accept the result in place of prompts, and give what they give for the prompts:

        encoded = lm.encode([document])
        answers = [lm.generate(encoded, seed=seed, stop=["\\n"]) for seed in range(10)]

    They raise an error if another model encoded the prompts. It is not checked whether weights, LoRA or quantization
    changed since: the encoder's output is that of the moment of `encode`. The same is true of the preprocessor.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: prompts as for `generate`, but not a dataset.
        truncate: as for `generate`.

    Returns:
        `EncodedPrompts`: S x E numbers per prompt on the model's device, and their ids.

    Raises:
        ValueError: as for `generate`.
        MemoryError, RuntimeError: as for `generate`.
    """
    with cuts_reported():
        batch = prompt_inputs(lm, inputs, truncate=truncate)
    if isinstance(inputs, EncodedPrompts):
        return inputs
    prompts = prompt_arrays(batch, None, lm.backbone.config.vocabulary_size)
    names = ("encoder_token_ids", "encoder_padding_mask")
    arrays = rounded_for(lm, {name: prompts[name] for name in names})
    program = lm.programs.get(("encode",), lambda: Program(partial(_encoder_output, lm), lm))
    with reading(lm, "encode"), memory_errors_explained(lm, prompts, arrays):
        output = program(arrays)
    rows, length = prompts["encoder_token_ids"].shape
    return EncodedPrompts(
        encoder_output=output[:rows, :length],
        is_single=np.ndim(batch["encoder_token_ids"]) == 1,
        backbone=weakref.ref(lm.backbone),
        **{name: prompts[name] for name in (*names, "decoder_token_ids", "decoder_padding_mask")},
    )


def prompt_inputs(lm, inputs, *, max_length: int | None = None, truncate: str | None = None) -> Mapping:
    """The inputs of `generate`, `stream`, `score` or `encode` as `prompt_arrays` takes them.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: prompts as for `generate`, but not a dataset, or `EncodedPrompts`.
        max_length: as for `generate`.
        truncate: as for `generate`.

    Raises:
        ValueError: if prompts are invalid, another model encoded them, or `truncate` is invalid or has no effect.
    """
    truncation = truncation_of(lm, truncate)
    if isinstance(inputs, EncodedPrompts):
        if inputs.backbone() is not lm.backbone:
            raise ValueError("The prompts were encoded by another model. Pass what this model's own `encode` returns.")
        if truncation:
            raise ValueError(f"The prompts are encoded already. Pass truncate={truncate!r} to `encode` instead.")
        return inputs.inputs()
    if lm.preprocessor is None:
        return inputs
    return lm.preprocessor.generate_preprocess(inputs, sequence_length=max_length, **truncation)


def truncation_of(lm, truncate: str | None) -> dict[str, str]:
    """The argument `truncate` of a call as a keyword of the preprocessor's methods; empty for None.

    Raises:
        ValueError: if it is not "left", "right" or None, or the model has no preprocessor.
    """
    if truncate is None:
        return {}
    check_choice(truncate, "truncate", ("left", "right"), others=", or None for the preprocessor's own setting")
    if lm.preprocessor is None:
        raise ValueError(
            f"`truncate` cuts texts, and this model has no `preprocessor`: cut the rows of ids. Received: "
            f"truncate={truncate!r}."
        )
    return {"truncate": truncate}


def _encoder_output(lm, inputs: dict[str, keras.KerasTensor]):
    """[B, S, E] for ids and mask [B, S]."""
    return lm.backbone.encoder(inputs["encoder_token_ids"], inputs["encoder_padding_mask"], training=False)
