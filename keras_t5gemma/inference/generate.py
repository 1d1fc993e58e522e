"""`generate`: texts or token ids from prompts."""

from collections.abc import Callable, Sequence
from functools import partial

import keras_hub
import numpy as np
from keras import ops

from keras_t5gemma._keras_internals import tensor_of
from keras_t5gemma.checks import integer, is_integer
from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.arrays import prompt_arrays, result_arrays
from keras_t5gemma.inference.buckets import rounded_for
from keras_t5gemma.inference.decoding.chunks import CHUNK_SIZE
from keras_t5gemma.inference.decoding.loop import (
    Control,
    caches_of_a_prompt,
    check_sampler,
    decode,
    has_common_loop,
)
from keras_t5gemma.inference.decoding.programs import decoding_stream, encoder_output_of
from keras_t5gemma.inference.decoding.stopping import output_mask
from keras_t5gemma.inference.encode import prompt_inputs
from keras_t5gemma.inference.logits_processors import Request, check_processors
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.inference.samplers.top_k_top_p import Draws
from keras_t5gemma.inference.stops import StopWatch, cut_at_stops, stop_texts
from keras_t5gemma.text.cuts import cuts_reported


def generate(
    lm,
    inputs,
    max_length: int | None = None,
    stop_token_ids: Sequence[int] | str | None = "auto",
    strip_prompt: bool = False,
    *,
    stop: str | Sequence[str] | None = None,
    truncate: str | None = None,
    max_new_tokens: int | Sequence[int] | None = None,
    processors: Sequence[Callable] = (),
    num_samples: int | None = None,
    seed: int | None = None,
    return_log_probs: bool = False,
):
    """Generates from prompts.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: with a preprocessor a string, a list of strings, a conversation if the preprocessor is for chats, or a
            dict of `encoder_text` and, to start the answer with, `decoder_text`. Without a preprocessor a dict of
            `encoder_token_ids` [B, S] and optionally `encoder_padding_mask`, `decoder_token_ids` [B, T] (prompts;
            `<bos>` if left out) and `decoder_padding_mask`. Or the result of `lm.encode`, or a `tf.data.Dataset`
            of batches of texts or ids.
        max_length: L, the length of the result in tokens with its decoder prompt; the preprocessor's
            `decoder_sequence_length` if left out, or the width of `decoder_token_ids` without a preprocessor.
        stop_token_ids: ids that end a sequence; "auto" for the tokenizer's `<eos>` and `<end_of_turn>`; None to
            always fill `max_length`.
        strip_prompt: whether to leave the decoder prompt out of the result.
        stop: texts that end an answer, such as ["\\n\\n", "Question:"], or one text; needs a preprocessor. An answer
            ends before its first stop string, wherever in a token that begins. Other rows are not affected, and the
            decoder prompt is not searched. Decoding ends a few tokens after the last row has stopped; beam search,
            contrastive search and samplers with a loop of their own run to their end, and the results are cut then. Of
            the ids, their mask and `log_probs`, the tokens that begin before the stop string remain. A token that
            begins before it and reaches into it remains whole, so the ids may have more text than `text`.
        truncate: "left" or "right" to cut prompts that are too long at that end, for this call only; None for the
            preprocessor's own setting. One warning says how many were cut.
        max_new_tokens: instead of `max_length`, how many tokens may follow the decoder prompt: an integer, or one per
            prompt.
        processors: logits processors, applied in this order: `RepetitionPenalty`, `NoRepeatNgrams`,
            `ForbiddenTokens`, `MinimumLength`, `ForcedTokens`, or any callable `(logits, sequences) -> logits`.
            Each new set is compiled; equal sets share a program.
        num_samples: n, results per prompt, which is read once: n draws of a random sampler, or the n best sequences of
            a beam search, the best first.
        seed: an integer that alone determines this call's random draws; it does not affect later calls. Without a
            seed, a call takes the next of the sampler's random numbers. Either way threads that call at the same time
            get the same results as one thread.
        return_log_probs: whether to return each token's log-probability too: the model's own, before processors and
            temperature, as `score` returns it.

    Returns:
        A string or a list of strings; without a preprocessor a dict of `decoder_token_ids` and
        `decoder_padding_mask`, arrays [B, L]. Without B for a single prompt. With `num_samples` a list of n strings
        in place of each string, and arrays [B, n, L]. With `return_log_probs` always a dict, with `log_probs` as an
        array in nats, 0 where nothing was generated, and with a preprocessor the strings as `text`.

    Raises:
        ValueError: if a prompt is empty or too long, ids are outside the vocabulary, `max_length` is too short, or
            options are out of range, contradict each other or are not supported by the sampler.
        MemoryError: if memory does not suffice; the message says how large keys and values are. The model remains
            usable.
        RuntimeError: if another thread is in `fit`. In a callback of a `fit` it works, as do `stream`, `score` and
            `embed`, and does not affect the training.
    """
    num_samples = integer(num_samples, "num_samples", optional=True)
    max_length = integer(max_length, "max_length", optional=True)
    options = {"processors": processors, "num_samples": num_samples or 1, "log_probs": bool(return_log_probs)}
    options["stop_token_ids"] = stop_ids(lm, stop_token_ids)
    stops = stop_texts(lm, stop)
    batches = inputs.as_numpy_iterator() if hasattr(inputs, "as_numpy_iterator") else [inputs]
    lengths = {"max_length": max_length, "max_new_tokens": max_new_tokens, "truncate": truncate}
    form = {"strip_prompt": strip_prompt, "stops": stops, "has_samples_axis": num_samples is not None}
    with cuts_reported(), reading(lm, "generate"), Draws(lm.sampler, seed) as draws:
        results = [_generate_batch(lm, batch, options, draws, **lengths, **form) for batch in batches]
    return results[0] if len(results) == 1 else _concatenated(results)


def _generate_batch(
    lm, batch, options, draws, *, max_length, max_new_tokens, truncate, strip_prompt, stops, has_samples_axis
):
    """`generate` for one batch: converts the prompts to arrays, runs the program, and converts the results back.

    Args:
        lm: as for `generate`.
        batch: as the `inputs` of `generate`, not a dataset.
        options: the arguments of `control_of`.
        draws: the `Draws` of this call, which the program advances.
        max_length: as for `generate`.
        max_new_tokens: as for `generate`.
        truncate: as for `generate`.
        strip_prompt: as for `generate`.
        stops: the result of `stop_texts`.
        has_samples_axis: whether the user set `num_samples`, so that results have an axis of n.

    Returns:
        As `generate` returns it.
    """
    batch = prompt_inputs(lm, batch, max_length=max_length, truncate=truncate)
    prompts = prompt_arrays(batch, max_length, lm.backbone.config.vocabulary_size, max_new_tokens)
    control = control_of(lm, prompts, **options)
    arrays = rounded_for(lm, prompts)
    with memory_errors_explained(lm, prompts, arrays, caches_of_a_prompt(lm.sampler, control)):
        has_room = prompts["limits"].max() > prompts["decoder_padding_mask"].sum(axis=1).min()
        if stops and has_room and has_common_loop(lm.sampler):
            outputs = _until_stopped(lm, control, arrays, prompts, stops, strip_prompt, draws)
        else:
            outputs, draws.values = generate_program(lm, control)(arrays, seeds=draws.values)
        outputs = {name: ops.convert_to_numpy(x) for name, x in outputs.items()}
    outputs = result_arrays(outputs, prompts, control.num_samples, strip_prompt)
    if lm.preprocessor is not None:
        texts = lm.preprocessor.generate_postprocess(outputs)
        if stops:
            names = ("decoder_token_ids", "decoder_padding_mask")
            rows = {name: np.repeat(prompts[name], control.num_samples, axis=0) for name in names}
            texts = cut_at_stops(lm.preprocessor, texts, outputs, stops, None if strip_prompt else rows)
        outputs = {"text": np.array(texts, object), **outputs}
    if has_samples_axis:
        outputs = {name: x.reshape(-1, control.num_samples, *x.shape[1:]) for name, x in outputs.items()}
    if np.ndim(batch["encoder_token_ids"]) == 1:
        outputs = {name: x[0] for name, x in outputs.items()}
    if lm.preprocessor is not None:
        text = outputs["text"]
        outputs["text"] = text.tolist() if isinstance(text, np.ndarray) else text
    return outputs["text"] if lm.preprocessor is not None and not control.log_probs else outputs


def _until_stopped(lm, control: Control, arrays: dict, prompts: dict, stops, strip_prompt: bool, draws: Draws) -> dict:
    """Decodes in chunks until every row has come to a stop string or its end; returns as `generate_step`."""
    lengths = prompts["decoder_padding_mask"].sum(axis=1)
    positions = range(int(lengths.min()), int(prompts["limits"].max()))
    samples, rows = control.num_samples, arrays["decoder_token_ids"].shape[0]
    watch = StopWatch(lm.preprocessor, stops, prompts, samples, rows * samples, control.stop_token_ids, strip_prompt)
    for state, chunk in decoding_stream(lm, control)(arrays, positions, CHUNK_SIZE, draws, watch.ended):
        watch.look(ops.convert_to_numpy(state.token_ids), chunk)
    names = ("decoder_padding_mask", "limits")
    prompt_mask, limits = (ops.repeat(tensor_of(arrays[name]), samples, axis=0) for name in names)
    mask = output_mask(state.token_ids, ops.cast(prompt_mask, "bool"), control.stop_token_ids, limits)
    outputs = {"decoder_token_ids": state.token_ids, "decoder_padding_mask": mask}
    return {**outputs, "log_probs": state.log_probs} if control.log_probs else outputs


def control_of(
    lm,
    prompts: dict[str, np.ndarray],
    *,
    stop_token_ids: tuple[int, ...] | None,
    processors: Sequence[Callable] = (),
    **options,
) -> Control:
    """The `Control` of a request, checked against the prompts and the sampler.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        prompts: the result of `prompt_arrays`.
        stop_token_ids: the result of `stop_ids`.
        processors: as for `generate`.
        **options: further fields of `Control`.

    Raises:
        ValueError: if the options contradict each other, the prompts or the sampler.
    """
    vocabulary_size = lm.backbone.config.vocabulary_size
    rooms = prompts["limits"] - prompts["decoder_padding_mask"].sum(axis=1)
    check_processors(processors, Request(vocabulary_size, rooms, stop_token_ids))
    control = Control(stop_token_ids, processors=tuple(processors), **options)
    check_sampler(lm.sampler, control, vocabulary_size)
    return control


def stop_ids(lm, stop_token_ids: Sequence[int] | str | None) -> tuple[int, ...] | None:
    """Checks and resolves the `stop_token_ids` of `generate`.

    Raises:
        ValueError: if they are not ids of the vocabulary, or are "auto" and the model has no preprocessor.
    """
    if stop_token_ids is None:
        return None
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        if lm.preprocessor is None:
            raise ValueError(
                'stop_token_ids="auto" reads the ids off the tokenizer, and this model has no `preprocessor`. Pass '
                "a sequence of ids, or None to always generate `max_length` tokens."
            )
        tokenizer = lm.preprocessor.tokenizer
        return (tokenizer.end_token_id, tokenizer.end_token2_id)
    is_sequence = hasattr(stop_token_ids, "__iter__") and not isinstance(stop_token_ids, (str, bytes))
    if not is_sequence or not all(map(is_integer, stop_token_ids)):
        raise ValueError(f'`stop_token_ids` must be a sequence of ids, "auto" or None. Received: {stop_token_ids!r}.')
    size = lm.backbone.config.vocabulary_size
    if outside := [int(i) for i in stop_token_ids if not 0 <= i < size]:
        raise ValueError(f"`stop_token_ids` must be in [0, {size}). Received: {outside}.")
    return tuple(map(int, stop_token_ids))


def generate_program(lm, control: Control) -> Program:
    """The compiled `generate_step` for a `Control`."""

    def new_program():
        return Program(partial(generate_step, lm, control=control), lm, seeds=lm.sampler.variables, decodes=True)

    return lm.programs.get(("generate", control), new_program)


def generate_step(
    lm,
    inputs: dict,
    stop_token_ids: Sequence[int] | None = None,
    control: Control | None = None,
    sampler: keras_hub.samplers.Sampler | None = None,
) -> dict:
    """Generates for one batch of arrays; compiled as one program if the backend compiles.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        inputs: `encoder_token_ids` and `encoder_padding_mask` [B, S], or the encoder's output as `encoder_output`
            [B, S, E] and `encoder_padding_mask`; `decoder_token_ids` and
            `decoder_padding_mask` [B, L], prompts padded on the right; optionally `prefill` [P], whose length says
            how many positions to run at once before the loop; optionally `limits` [B], the maximum length of each row
            in tokens.
        stop_token_ids: ids that end a row, or None.
        control: a `Control` with all options; it replaces `stop_token_ids`.
        sampler: a sampler to use instead of the model's.

    Returns:
        `{"decoder_token_ids", "decoder_padding_mask"}`, both [B n, L], n samples per prompt, and `log_probs` if the
        control requests them.
    """
    token_ids, decoder = inputs["decoder_token_ids"], lm.backbone.decoder
    sampler = lm.sampler if sampler is None else sampler
    prefill = inputs["prefill"].shape[0] if "prefill" in inputs else 0
    encoder_output, encoder_mask = encoder_output_of(lm, inputs)
    token_ids, mask, log_probs = decode(
        lm.recorded_step,
        sampler,
        token_ids,
        inputs["decoder_padding_mask"],
        decoder.start_cache(encoder_output, encoder_mask, token_ids.shape[1], _tokens_per_step(sampler, prefill)),
        prefill=prefill,
        limits=inputs.get("limits"),
        control=control or Control(stop_token_ids),
        model=lm,
    )
    outputs = {"decoder_token_ids": token_ids, "decoder_padding_mask": mask}
    return outputs if log_probs is None else {**outputs, "log_probs": log_probs}


def _tokens_per_step(sampler: keras_hub.samplers.Sampler, prefill: int) -> int | None:
    """The maximum number of tokens per decoding step; None if the sampler reads whole sequences at once."""
    return None if isinstance(sampler, keras_hub.samplers.ContrastiveSampler) else prefill


def _concatenated(results: list) -> list | dict:
    """Concatenates the results of several batches; shorter arrays are padded with zeros."""
    if isinstance(results[0], list):
        return [text for texts in results for text in texts]
    concatenated = {}
    for name in results[0]:
        batches = [result[name] for result in results]
        if name == "text":
            concatenated[name] = _concatenated(batches)
            continue
        width = max(batch.shape[-1] for batch in batches)
        batches = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in batches]
        concatenated[name] = np.concatenate(batches)
    return concatenated
