"""`score`: the log-probabilities of given targets, in one pass and without the logits of the whole batch."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from keras import ops, tree

from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.arrays import left_aligned, prompt_arrays, scoring_arrays
from keras_t5gemma.inference.buckets import rounded_for
from keras_t5gemma.inference.decoding.loop import token_log_probs
from keras_t5gemma.inference.decoding.programs import encoder_output_of
from keras_t5gemma.inference.encode import EncodedPrompts, prompt_inputs
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.kernels.cross_entropy.chunks import TokenChunks, default_chunk_bytes
from keras_t5gemma.text.cuts import cuts_reported


def score(
    lm, inputs, targets, *, closed: bool = True, truncate: str | None = None
) -> dict[str, np.ndarray | list[np.ndarray]]:
    """The log-likelihood of each target given its input, by the model alone: no temperature, no processors.

    One teacher-forced pass computes it. `generate(return_log_probs=True)` returns the same numbers for the same tokens.
    A prompt may have several targets, such as the answers to a question. It is then encoded once, and its
    cross-attention's keys and values are computed once.

        lm.score(questions, [["no", "yes"], ["blue", "green", "red"]])["log_likelihood"]

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: one or more prompts, as for `generate`, encoded or not; a target follows the start of its answer, if the
            prompt has one.
        targets: with a preprocessor a string per prompt; without one a row of ids per prompt, of any length, or the
            result of `generate(strip_prompt=True)`. Or a list of strings or of rows per prompt.
        closed: whether texts are complete answers, whose end (`<eos>`, after `<end_of_turn>` if the preprocessor is for
            chats) is scored too, or beginnings of answers. Ids are scored as they are.
        truncate: as for `generate`; it applies to prompts and targets.

    Returns:
        A dict of `log_likelihood`, float32 [B], in nats; `is_greedy`, bool [B], whether each token of the target is the
        model's most likely one; and `log_probs`, float32 [B, M], of each target's tokens, 0 after its end. Without B
        for a single prompt. With n targets per prompt [B, n] and [B, n, M], or a list of B arrays if n differs.

    Raises:
        ValueError: if prompts or targets are not as described, or do not match in number.
        MemoryError, RuntimeError: as for `generate`.
    """
    with cuts_reported():
        return _scores(lm, inputs, targets, closed, truncate)


def _scores(lm, inputs, targets, closed: bool, truncate: str | None):
    """`score`, with the same arguments."""
    is_encoded = isinstance(inputs, EncodedPrompts)
    inputs = prompt_inputs(lm, inputs, truncate=None if is_encoded else truncate)
    is_single = np.ndim(inputs["encoder_token_ids"]) == 1
    vocabulary_size = lm.backbone.config.vocabulary_size
    prompts = prompt_arrays(inputs, None, vocabulary_size)
    counts = _counts_per_prompt(targets, len(prompts["encoder_token_ids"]), is_single, lm.preprocessor is not None)
    if counts is not None:
        targets = [target for group in ([targets] if is_single else targets) for target in group]
    if lm.preprocessor is not None:
        targets = _target_rows(lm.preprocessor, targets, closed, truncate)
    arrays, lengths = scoring_arrays(prompts, targets, vocabulary_size, counts)
    (rows, length), rounded = arrays["labels"].shape, rounded_for(lm, arrays)
    program = lm.programs.get(("score",), lambda: Program(partial(score_step, lm), lm))
    with reading(lm, "score"), memory_errors_explained(lm, arrays, rounded):
        log_probs, is_top = (ops.convert_to_numpy(x)[:rows, :length] for x in program(rounded))
    mask = arrays["label_mask"]
    log_probs = left_aligned(log_probs, mask)[:, : lengths.max()]
    scores = {
        "log_likelihood": log_probs.sum(axis=1),
        "is_greedy": (is_top | ~mask).all(axis=1),
        "log_probs": log_probs,
    }
    if counts is not None:
        scores = {name: _grouped(x, counts) for name, x in scores.items()}
    return {name: x[0] for name, x in scores.items()} if is_single else scores


def score_step(lm, inputs):
    """Scores labels; compiled as one program.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: the model's four inputs, perhaps with `encoder_output` [B, S, E], and `labels` [R, T]. If there is
            `prompt_rows` [R], decoder row r belongs to prompt `prompt_rows[r]` of the encoder's B; else R is B.

    Returns:
        `(log_probs, is_top)`: float32 and bool [R, T], whether no other token has a larger logit.
    """
    hidden, labels = _hidden_states(lm, inputs), inputs["labels"]
    chunks = TokenChunks(hidden.shape, lm.backbone.config.vocabulary_size, default_chunk_bytes(hidden))
    hidden_chunks, label_chunks = chunks.cut(hidden), chunks.cut(labels)

    def body(i, results):
        # `lm.head` handles a quantized embedding too.
        logits = ops.cast(lm.head(ops.expand_dims(hidden_chunks[i], 0))[0], "float32")
        label = ops.expand_dims(label_chunks[i], 1)
        is_top = ops.take_along_axis(logits, label, axis=1) >= ops.max(logits, axis=1, keepdims=True)
        rows = token_log_probs(logits, label), ops.cast(is_top, "float32")
        return tuple(ops.slice_update(x, [i, 0], ops.transpose(row)) for x, row in zip(results, rows, strict=True))

    start = tuple(ops.zeros(label_chunks.shape, "float32") for _ in range(2))
    log_probs, is_top = (chunks.join(x, ops.shape(labels)) for x in ops.fori_loop(0, chunks.count, body, start))
    return log_probs, is_top > 0


def _hidden_states(lm, inputs):
    """The decoder's hidden states [R, T, D], with each prompt encoded once."""
    if "prompt_rows" not in inputs and "encoder_output" in inputs:
        ids, mask = inputs["decoder_token_ids"], inputs["decoder_padding_mask"]
        return lm.backbone.decoder(ids, mask, *encoder_output_of(lm, inputs), training=False)
    if "prompt_rows" not in inputs:
        names = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")
        return lm.hidden_states({name: inputs[name] for name in names}, training=False)
    token_ids, decoder = inputs["decoder_token_ids"], lm.backbone.decoder
    cache = decoder.start_cache(*encoder_output_of(lm, inputs), token_ids.shape[1])
    cache = tree.map_structure(lambda x: ops.take(x, inputs["prompt_rows"], axis=0), cache)
    return decoder.step(token_ids, inputs["decoder_padding_mask"], cache, 0)[0]


def _counts_per_prompt(targets, prompts: int, is_single: bool, has_texts: bool) -> list[int] | None:
    """The number of targets of each prompt, or None if each prompt has one, outside of a list.

    Args:
        targets: as for `score`.
        prompts: B.
        is_single: whether there is one prompt, without the batch axis. Its list of one target is one target.
        has_texts: whether targets are strings rather than rows of ids.

    Raises:
        ValueError: if only some prompts have a list of targets, a list is empty, or there are not as many as prompts.
    """
    if isinstance(targets, (str, Mapping)) or not len(targets):
        return None

    def is_list(value) -> bool:
        if not isinstance(value, (list, tuple, np.ndarray)):
            return False
        return has_texts or (len(value) > 0 and isinstance(value[0], (list, tuple, np.ndarray)))

    groups = [targets] if is_single else targets
    lists = [is_list(group) for group in groups]
    if not any(lists) or (is_single and len(targets) == 1):
        return None
    if not all(lists) or len(groups) != prompts or not all(map(len, groups)):
        raise ValueError(
            f"`targets` must have one target per prompt, or one list of one or more targets per prompt, {prompts} in "
            f"all. Received: {len(groups)}, of which {sum(lists)} are lists."
        )
    return [len(group) for group in groups]


def _grouped(x: np.ndarray, counts: list[int]) -> np.ndarray | list[np.ndarray]:
    """[B, n, ...] of rows [B * n, ...]; a list of [n, ...] if the counts n differ."""
    if len(set(counts)) == 1:
        return x.reshape(len(counts), counts[0], *x.shape[1:])
    return np.split(x, np.cumsum(counts)[:-1])


def _target_rows(preprocessor, texts: Sequence[str] | str, closed: bool, truncate: str | None) -> list:
    """Rows of token ids of texts, without `<bos>`."""
    packer = preprocessor.packer(truncate)
    rows, _ = packer.answers(texts, preprocessor.decoder_sequence_length, closed=closed)
    # The prompts begin with <bos> already.
    rows = [row[1:] for row in rows]
    if not all(rows):
        raise ValueError("`targets` has an empty text; with `closed=True` its end would be scored.")
    return rows
