"""`embed`: texts as vectors, the pooled output of the encoder."""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from keras import ops

from keras_t5gemma.checks import check_token_ids, integer
from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.buckets import rounded_for
from keras_t5gemma.inference.encode import truncation_of
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.layers.pooling import POOLINGS, pooled
from keras_t5gemma.progress import text_progress
from keras_t5gemma.suggestions import check_choice
from keras_t5gemma.text.cuts import cuts_reported
from keras_t5gemma.text.encoding import pad_rows


def embed(
    lm,
    inputs,
    pooling: str = "mean",
    *,
    batch_size: int = 32,
    truncate: str | None = None,
    progress: bool = False,
) -> np.ndarray:
    """The encoder's representation of each text, in one vector.

    Texts are sorted by length and padded, in batches, to the model's `buckets`, so that a short text does not pay for a
    long one and few programs are compiled. Neither changes a text's vector.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: with a preprocessor a text or a list of texts, which the encoder reads as in `generate` (in turns, if
            the preprocessor is for chats). Without one a list of N rows of ids, of any length, an array [N, S], or a
            dict of `encoder_token_ids` and `encoder_padding_mask` [N, S].
        pooling: "mean" of all tokens, or "last" for the last token, which represents the whole text in the
            classification tasks of arXiv 2504.06225. Both ignore padding.
        batch_size: the maximum number of texts per batch.
        truncate: as for `generate`.
        progress: whether to show a progress bar.

    Returns:
        float32 [N, D of the encoder], in the order of the inputs; without N for a single text.

    Raises:
        ValueError: if there is no text, a text is empty or too long, ids are outside the vocabulary, or `pooling` or
            `batch_size` is invalid.
        MemoryError, RuntimeError: as for `generate`.
    """
    check_choice(pooling, "pooling", POOLINGS)
    batch_size = integer(batch_size, "batch_size")
    with cuts_reported():
        rows, batched = encoder_rows(lm, inputs, truncate)
    program = lm.programs.get(("embed", pooling), lambda: Program(partial(_pooled, lm, pooling=pooling), lm))
    width = lm.backbone.config.encoder.hidden_dim
    vectors = vectors_of(lm, rows, program, width, batch_size=batch_size, progress=progress)
    return vectors if batched else vectors[0]


def vectors_of(model, rows: list, program: Callable, width: int, *, batch_size: int, progress: bool) -> np.ndarray:
    """A vector per text, batch by batch, as `embed` describes it.

    Args:
        model: a model with a `backbone`, `buckets` and perhaps a `preprocessor`.
        rows: N rows of ids, as `encoder_rows` returns them.
        program: `{"encoder_token_ids": [B, S], "encoder_padding_mask": [B, S]} -> [B, width]`.
        width: of the vectors.
        batch_size: as for `embed`.
        progress: as for `embed`.

    Returns:
        float32 [N, width], in the order of the rows.

    Raises:
        MemoryError, RuntimeError: as for `embed`.
    """
    vectors = np.zeros((len(rows), width), "float32")
    # The longest first, so that a lack of memory shows at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    with text_progress("Embedding", len(rows)) if progress else contextlib.nullcontext() as advance:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = pad_rows([rows[i] for i in chosen], len(rows[chosen[0]]), pad_id=0)
            batch = {"encoder_token_ids": ids, "encoder_padding_mask": mask}
            arrays = rounded_for(model, batch, batch_size)
            with reading(model, "embed"), memory_errors_explained(model, batch, arrays):
                vectors[chosen] = ops.convert_to_numpy(program(arrays))[: len(chosen)]
            if progress:
                advance(len(chosen))
    return vectors


def _pooled(lm, inputs, pooling):
    """Encodes and pools one batch.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: a dict of `encoder_token_ids` and `encoder_padding_mask`, int [B, S].
        pooling: as for `embed`.

    Returns:
        float32 [B, D].
    """
    mask = inputs["encoder_padding_mask"]
    return pooled(lm.backbone.encoder(inputs["encoder_token_ids"], mask, training=False), mask, pooling)


def encoder_rows(model, inputs, truncate: str | None = None) -> tuple[list, bool]:
    """`(rows, batched)`: rows of ids without padding, and whether `inputs` has a batch axis."""
    truncation = truncation_of(model, truncate)
    if model.preprocessor is not None:
        return model.preprocessor.packer(**truncation).prompts(inputs, model.preprocessor.encoder_sequence_length)
    return _token_rows(inputs, model.backbone.config.vocabulary_size)


def _token_rows(inputs, vocabulary_size: int) -> tuple[list, bool]:
    """`encoder_rows` of token ids, which it checks."""
    masks = None
    if isinstance(inputs, Mapping):
        inputs, masks = inputs["encoder_token_ids"], inputs.get("encoder_padding_mask")
    if isinstance(inputs, str) or not len(inputs):
        raise ValueError(
            f"Without a preprocessor `inputs` must be rows of token ids, at least one. Received: {inputs!r}."
        )
    batched = np.ndim(inputs[0]) > 0
    rows = [np.asarray(row) for row in (inputs if batched else [inputs])]
    if masks is not None:
        rows = [row[keep != 0] for row, keep in zip(rows, np.reshape(masks, (len(rows), -1)), strict=True)]
    for i, row in enumerate(rows):
        if row.ndim != 1 or not row.size:
            raise ValueError(f"`inputs`[{i}] must be a row of token ids that is not empty. Received: {row!r}.")
    check_token_ids({"encoder_token_ids": np.concatenate(rows)}, vocabulary_size)
    return rows, batched
