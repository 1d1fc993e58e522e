"""`score`: the log-probabilities of given targets, in one pass and without the logits of the whole batch."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from keras import ops

from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.arrays import left_aligned, prompt_arrays, scoring_arrays
from keras_t5gemma.inference.buckets import rounded_for
from keras_t5gemma.inference.decoding.loop import token_log_probs
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.kernels.cross_entropy.chunks import TokenChunks, default_chunk_bytes
from keras_t5gemma.text.encoding import Packer


def score(lm, inputs, targets, *, closed: bool = True) -> dict[str, np.ndarray]:
    """The log-likelihood of each target given its input, by the model alone: no temperature, no processors.

    One teacher-forced pass computes it. `generate(return_log_probs=True)` returns the same numbers for the same tokens.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: one or more prompts, as for `generate`; a target follows the start of its answer, if the prompt has one.
        targets: with a preprocessor a string per prompt; without one a row of ids per prompt, of any length, or the
            result of `generate(strip_prompt=True)`.
        closed: whether texts are complete answers, whose end (`<eos>`, after `<end_of_turn>` if the preprocessor is for
            chats) is scored too, or beginnings of answers. Ids are scored as they are.

    Returns:
        A dict of `log_likelihood`, float32 [B], in nats, and `log_probs`, float32 [B, M], of each target's tokens,
        0 after its end. Without B for a single prompt.

    Raises:
        ValueError: if prompts or targets are not as described, or do not match in number.
        MemoryError, RuntimeError: as for `generate`.
    """
    if lm.preprocessor is not None:
        inputs = lm.preprocessor.generate_preprocess(inputs)
        targets = _target_rows(lm.preprocessor, targets, closed)
    vocabulary_size = lm.backbone.config.vocabulary_size
    arrays, lengths = scoring_arrays(prompt_arrays(inputs, None, vocabulary_size), targets, vocabulary_size)
    (rows, length), rounded = arrays["labels"].shape, rounded_for(lm, arrays)
    program = lm.programs.get(("score",), lambda: Program(partial(score_step, lm), lm))
    with reading(lm, "score"), memory_errors_explained(lm, arrays, rounded):
        log_probs = ops.convert_to_numpy(program(rounded))[:rows, :length]
    log_probs = left_aligned(log_probs, arrays["label_mask"])[:, : lengths.max()]
    scores = {"log_likelihood": log_probs.sum(axis=1), "log_probs": log_probs}
    return {name: x[0] for name, x in scores.items()} if np.ndim(inputs["encoder_token_ids"]) == 1 else scores


def score_step(lm, inputs):
    """Log-probabilities, float32 [B, T], of `labels` [B, T] given the model's four inputs; compiled as one program."""
    names = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")
    outputs = lm.backbone({name: inputs[name] for name in names}, training=False)
    hidden, labels = outputs["decoder_sequence_output"], inputs["labels"]
    chunks = TokenChunks(hidden.shape, lm.backbone.config.vocabulary_size, default_chunk_bytes(hidden))
    hidden_chunks, label_chunks = chunks.cut(hidden), chunks.cut(labels)

    def body(i, log_probs):
        # `lm.head` handles a quantized embedding too.
        logits = lm.head(ops.expand_dims(hidden_chunks[i], 0))[0]
        chunk_log_probs = token_log_probs(logits, ops.expand_dims(label_chunks[i], 1))
        return ops.slice_update(log_probs, [i, 0], ops.transpose(chunk_log_probs))

    log_probs = ops.fori_loop(0, chunks.count, body, ops.zeros(label_chunks.shape, "float32"))
    return chunks.join(log_probs, ops.shape(labels))


def _target_rows(preprocessor, texts: Sequence[str] | str, closed: bool) -> list:
    """Rows of token ids of texts, without `<bos>`."""
    packer = Packer(preprocessor.tokenizer, preprocessor.chat, preprocessor.truncate)
    rows, _ = packer.answers(texts, preprocessor.decoder_sequence_length, closed=closed)
    # The prompts begin with <bos> already.
    rows = [row[1:] for row in rows]
    if not all(rows):
        raise ValueError("`targets` has an empty text; with `closed=True` its end would be scored.")
    return rows
