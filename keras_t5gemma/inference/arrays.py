"""Converts prompts and targets to arrays, checks them, and converts results back."""

from collections.abc import Mapping, Sequence

import numpy as np

from keras_t5gemma.checks import check_token_ids, integer
from keras_t5gemma.config import BOS_ID


def prompt_arrays(
    inputs: Mapping,
    max_length: int | None,
    vocabulary_size: int,
    max_new_tokens: int | Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of one decoding run, from token ids.

    Args:
        inputs: `encoder_token_ids` [B, S] or [S], and optionally `encoder_padding_mask`, `decoder_token_ids` ([B, T] or
            [T]; `<bos>` if left out) and `decoder_padding_mask`. With `encoder_output` [B, S, E], no position of
            S may be padding in every row.
        max_length: L, the length of the result; T if None.
        vocabulary_size: V.
        max_new_tokens: instead of `max_length`, how many tokens may follow the prompt: an integer, or one per row.

    Returns:
        A dict of int32 arrays: `encoder_token_ids`, `encoder_padding_mask` [B, S], without positions on either side
        that are padding in every row; `decoder_token_ids`, `decoder_padding_mask` [B, L], prompts moved to the left;
        `limits` [B], the maximum length of each row in tokens; `prefill` [P]. P is 0 or the power of two that covers
        the prompt positions common to all rows, a power so that few programs are compiled; it may exceed L. And the
        `encoder_output` of `inputs`, if it has one.

    Raises:
        ValueError: if ids are outside the vocabulary, shapes do not match, a prompt is empty, `max_length` is shorter
            than a prompt, or `max_new_tokens` is not positive, not one per row or passed together with `max_length`.
    """
    if not isinstance(inputs, Mapping) or "encoder_token_ids" not in inputs:
        keys = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(
            f"Without a preprocessor the model takes a dict with `encoder_token_ids` (and optionally "
            f"`encoder_padding_mask`, `decoder_token_ids`, `decoder_padding_mask`). Received: {keys}."
        )
    encoder_ids, encoder_mask = _ids_and_mask(inputs, "encoder", None)
    batch = encoder_ids.shape[0]
    decoder_ids, decoder_mask = _ids_and_mask(inputs, "decoder", np.full((batch, 1), BOS_ID))
    check_token_ids({"encoder_token_ids": encoder_ids, "decoder_token_ids": decoder_ids}, vocabulary_size)
    if decoder_ids.shape[0] != batch:
        raise ValueError(
            f"`decoder_token_ids` has {decoder_ids.shape[0]} rows and `encoder_token_ids` {batch}; they must match."
        )
    if not encoder_mask.any(axis=1).all():
        raise ValueError("`encoder_token_ids` has a row with no token that is not padding: an empty prompt.")
    lengths = (decoder_mask != 0).sum(axis=1)
    if not lengths.all():
        raise ValueError("`decoder_token_ids` has an empty row; a decoder prompt holds at least `<bos>`.")
    max_length = integer(max_length, "max_length", optional=True)
    length = decoder_ids.shape[1] if max_length is None else max_length
    limits = np.full((batch,), length, "int32")
    if max_new_tokens is not None:
        limits = _limits(lengths, max_length, max_new_tokens)
        length = int(limits.max())
    if lengths.max() > length:
        raise ValueError(
            f"`max_length` counts the decoder prompt too, and the longest here has {lengths.max()} tokens. Received: "
            f"max_length={length}."
        )
    token_ids, mask = np.zeros((batch, length), "int32"), np.zeros((batch, length), "int32")
    for row, (ids, keep) in enumerate(zip(decoder_ids, decoder_mask, strict=True)):
        token_ids[row, : lengths[row]], mask[row, : lengths[row]] = ids[keep != 0], 1
    common_length = int(lengths.min()) - 1
    prefill = 1 << (common_length - 1).bit_length() if common_length else 0
    return {
        **({"encoder_output": inputs["encoder_output"]} if "encoder_output" in inputs else {}),
        **_without_padding(encoder_ids, encoder_mask),
        "decoder_token_ids": token_ids,
        "decoder_padding_mask": mask,
        "limits": limits,
        "prefill": np.zeros((prefill,), "int32"),
    }


def result_arrays(
    outputs: dict[str, np.ndarray], prompts: dict[str, np.ndarray], samples: int, strip_prompt: bool
) -> dict[str, np.ndarray]:
    """The generated sequences as arrays: ids with zeros at padding, and their mask.

    Args:
        outputs: `decoder_token_ids`, `decoder_padding_mask` as generated, and perhaps `log_probs`, all with at least
            B n rows and L positions.
        prompts: the result of `prompt_arrays`.
        samples: n, sequences per prompt.
        strip_prompt: whether to drop the prompts and move the generated tokens to the left.

    Returns:
        A dict of `decoder_token_ids` int32, `decoder_padding_mask` bool, and perhaps `log_probs` float32, which are 0
        where nothing was generated, all [B n, L].
    """
    generated = np.repeat(prompts["decoder_padding_mask"] == 0, samples, axis=0)
    rows, length = generated.shape
    outputs = {name: x[:rows, :length] for name, x in outputs.items()}
    mask = outputs["decoder_padding_mask"].astype(bool)
    generated &= mask
    results = {"decoder_token_ids": np.where(mask, outputs["decoder_token_ids"], 0).astype("int32")}
    results["decoder_padding_mask"] = mask
    if "log_probs" in outputs:
        results["log_probs"] = np.where(generated, outputs["log_probs"], 0).astype("float32")
    return {name: left_aligned(x, generated) for name, x in results.items()} if strip_prompt else results


def left_aligned(x: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Rows [B, L] with the items where `keep`, bool [B, L], is True moved to the left, and zeros after them."""
    order = np.argsort(~keep, axis=1, kind="stable")
    return np.take_along_axis(np.where(keep, x, np.zeros_like(x)), order, 1)


def scoring_arrays(
    prompts: dict[str, np.ndarray], targets, vocabulary_size: int, counts: Sequence[int] | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of one teacher-forced pass over prompts and the targets that follow them.

    Args:
        prompts: the result of `prompt_arrays`.
        targets: rows of ids that follow the prompts: a list or array of B rows of any length, a single row if B is 1,
            or a dict of `decoder_token_ids` and `decoder_padding_mask` [B, M], as `generate(strip_prompt=True)` returns
            it. With `counts` R rows.
        vocabulary_size: V.
        counts: the number of targets of each prompt, R in all, or None if each has one.

    Returns:
        `(arrays, lengths)`: the model's four inputs and `labels`, `label_mask` [B, T], True at targets; and the
        targets' lengths, int [B]. With `counts` all but the encoder's inputs have R rows, and `prompt_rows`, int32 [R],
        has the number of each row's prompt.

    Raises:
        ValueError: if targets are not as described, empty, or hold ids outside the vocabulary.
    """
    names = ("encoder_token_ids", "encoder_padding_mask", "encoder_output")
    encoder_arrays = {name: prompts[name] for name in names if name in prompts}
    if counts is not None:
        prompt_rows = np.repeat(np.arange(len(counts), dtype="int32"), counts)
        encoder_arrays["prompt_rows"] = prompt_rows
        prompts = {name: prompts[name][prompt_rows] for name in ("decoder_token_ids", "decoder_padding_mask")}
    batch = len(prompts["decoder_token_ids"])
    if not isinstance(targets, Mapping) and (isinstance(targets, str) or not len(targets)):
        raise ValueError(f"`targets` must be rows of ids, or a dict of them and their mask. Received: {targets!r}.")
    if isinstance(targets, Mapping):
        ids, mask = _ids_and_mask(targets, "decoder", None)
        targets = [row[keep != 0] for row, keep in zip(ids, mask, strict=True)]
    elif np.ndim(targets[0]) == 0:
        targets = [targets]
    rows = [np.asarray(row) for row in targets]
    if len(rows) != batch:
        raise ValueError(f"`targets` must have a row per prompt, {batch}. Received: {len(rows)} rows.")
    for i, row in enumerate(rows):
        if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(
                f"`targets` must have rows of at least one integer. Received in row {i}: shape {row.shape}, dtype "
                f"{row.dtype}."
            )
        if row.min() < 0 or row.max() >= vocabulary_size:
            raise ValueError(
                f"`targets` must be in [0, {vocabulary_size}), the backbone's vocabulary. Received in row {i}: ids "
                f"from {row.min()} to {row.max()}."
            )
    lengths = np.array([len(row) for row in rows])
    starts = prompts["decoder_padding_mask"].sum(axis=1)
    width = int((starts + lengths).max()) - 1
    ids, mask = np.zeros((batch, width + 1), "int32"), np.zeros((batch, width + 1), "int32")
    for row, (start, target) in enumerate(zip(starts, rows, strict=True)):
        ids[row, :start], ids[row, start : start + len(target)] = prompts["decoder_token_ids"][row, :start], target
        mask[row, : start + len(target)] = 1
    label_mask = (mask == 1) & (np.arange(width + 1) >= starts[:, None])
    # The last token of a row is a label only: no later position would see it as an input.
    inputs = mask[:, :-1] * mask[:, 1:]
    return {
        **encoder_arrays,
        "decoder_token_ids": ids[:, :-1] * inputs,
        "decoder_padding_mask": inputs,
        "labels": ids[:, 1:],
        "label_mask": label_mask[:, 1:],
    }, lengths


def _limits(lengths: np.ndarray, max_length: int | None, max_new_tokens: int | Sequence[int]) -> np.ndarray:
    """int32 [B]: the maximum length in tokens of rows whose prompts have these lengths."""
    if max_length is not None:
        raise ValueError(
            f"`max_new_tokens` and `max_length` both limit the result: pass one of them. Received: "
            f"max_new_tokens={max_new_tokens!r}, max_length={max_length!r}."
        )
    new = np.asarray(max_new_tokens)
    if not np.issubdtype(new.dtype, np.integer) or new.shape not in ((), lengths.shape) or new.min() < 1:
        raise ValueError(
            f"`max_new_tokens` must be a positive integer, or one per row, {len(lengths)}. Received: "
            f"{max_new_tokens!r}."
        )
    return (lengths + new).astype("int32")


def _without_padding(ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The encoder's ids and mask [B, S] without leading and trailing positions that are padding in every row."""
    (used,) = np.nonzero(mask.any(axis=0))
    span = slice(used[0], used[-1] + 1)
    return {"encoder_token_ids": ids[:, span], "encoder_padding_mask": mask[:, span]}


def _ids_and_mask(inputs: Mapping, side: str, default: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The token ids and padding mask of one side, checked, as integer arrays [B, L].

    Args:
        inputs: as for `prompt_arrays`.
        side: "encoder" or "decoder".
        default: ids [B, L] if `inputs` has none for this side.

    Returns:
        `(ids, mask)`.

    Raises:
        ValueError: if the ids are not integers, are empty or have more than two axes, or the mask has another shape.
    """
    ids = inputs.get(f"{side}_token_ids", default)
    ids = np.asarray(ids)
    ids = np.atleast_2d(ids) if ids.ndim < 2 else ids
    if ids.ndim != 2 or not ids.size:
        raise ValueError(f"`{side}_token_ids` must be a non-empty [batch, length]. Received: shape {ids.shape}.")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"`{side}_token_ids` must hold integers. Received: dtype={ids.dtype}.")
    mask = np.asarray(inputs.get(f"{side}_padding_mask", np.ones_like(ids)))
    mask = np.atleast_2d(mask)
    if mask.shape != ids.shape:
        raise ValueError(
            f"`{side}_padding_mask` must have the shape of `{side}_token_ids`, {ids.shape}. Received: {mask.shape}."
        )
    return ids.astype("int32"), mask.astype("int32")
