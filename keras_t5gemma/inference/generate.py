"""`generate`: texts or token ids from prompts."""

from functools import partial

import keras_hub
import numpy as np
from keras import ops

from keras_t5gemma.checks import integer, is_integer
from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.arrays import prompt_arrays, result_arrays
from keras_t5gemma.inference.buckets import rounded_for
from keras_t5gemma.inference.decoding.loop import Control, caches_of_a_prompt, check_sampler, decode
from keras_t5gemma.inference.logits_processors import Request, check_processors
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.inference.samplers.top_k_top_p import Draws


def generate(
    lm,
    inputs,
    max_length=None,
    stop_token_ids="auto",
    strip_prompt=False,
    *,
    max_new_tokens=None,
    processors=(),
    num_samples=None,
    seed=None,
    return_log_probs=False,
):
    """Generates from prompts.

    Args:
        inputs: with a preprocessor a string, a list of strings, a conversation where the preprocessor is for chats,
            or a dict of `encoder_text` and, to start the answer with, `decoder_text`. Without one a dict of
            `encoder_token_ids` [B, S] and optionally `encoder_padding_mask`, `decoder_token_ids` [B, T] (prompts;
            `<bos>` where left out) and `decoder_padding_mask`. Or a `tf.data.Dataset` of batches of either.
        max_length: L, tokens of the result with its decoder prompt; the preprocessor's `decoder_sequence_length`
            where left out, or the width of `decoder_token_ids` without a preprocessor.
        stop_token_ids: ids that end a sequence; "auto" for the tokenizer's `<eos>` and `<end_of_turn>`; None to
            always fill `max_length`.
        strip_prompt: leave the decoder prompt out of the result.
        max_new_tokens: instead of `max_length`, how many tokens may follow the decoder prompt: an integer, or one a
            prompt.
        processors: logits processors, applied in this order: `RepetitionPenalty`, `NoRepeatNgrams`,
            `ForbiddenTokens`, `MinimumLength`, `ForcedTokens`, or any callable `(logits, sequences) -> logits`.
            Each new set is compiled; equal ones share a program.
        num_samples: n, results for each prompt, which is read once: draws of a sampler that is random, or the n
            best of a beam search, the best first.
        seed: an integer that this call's random draws depend on and nothing else; later calls go on as if there
            had been none. Without one a call takes the next of the sampler's random numbers. Either way threads
            that call at once get what one would.
        return_log_probs: whether to return each token's log-probability too, that of the model alone, before
            processors and temperature, as `score` gives it.

    Returns:
        A string or a list of strings; without a preprocessor a dict of `decoder_token_ids` and
        `decoder_padding_mask`, arrays [B, L]. Without B for a single prompt. With `num_samples` a list of n strings
        in place of each string, and arrays [B, n, L]. With `return_log_probs` always a dict, with `log_probs` as an
        array in nats, 0 where nothing was generated, and with a preprocessor the strings as `text`.

    Raises:
        ValueError: for an empty or over-long prompt, ids outside the vocabulary, a `max_length` too short, or
            options that are out of range, contradict each other or that the sampler cannot meet.
        MemoryError: where memory does not suffice; the message says about how many rows would fit. The model can
            be used on.
        RuntimeError: if another thread is in `fit`. In a callback of a `fit` it works, as `stream`, `score` and
            `embed` do, and leaves the training as if it had not been.
    """
    num_samples = integer(num_samples, "num_samples", optional=True)
    options = {"processors": processors, "num_samples": num_samples or 1, "log_probs": bool(return_log_probs)}
    options["stop_token_ids"] = stop_ids(lm, stop_token_ids)
    batches = inputs.as_numpy_iterator() if hasattr(inputs, "as_numpy_iterator") else [inputs]
    several = num_samples is not None
    with reading(lm, "generate"), Draws(lm.sampler, seed) as draws:
        results = [
            _generate_batch(lm, batch, max_length, max_new_tokens, strip_prompt, several, options, draws)
            for batch in batches
        ]
    return results[0] if len(results) == 1 else _joined(results)


def _generate_batch(lm, batch, max_length, max_new_tokens, strip_prompt, several, options, draws):
    if lm.preprocessor is not None:
        batch = lm.preprocessor.generate_preprocess(batch, sequence_length=max_length)
    prompts = prompt_arrays(batch, max_length, lm.backbone.config.vocabulary_size, max_new_tokens)
    control = control_of(lm, prompts, **options)
    arrays = rounded_for(lm, prompts)
    with memory_errors_explained(lm, prompts, arrays, caches_of_a_prompt(lm.sampler, control)):
        outputs, draws.values = generate_program(lm, control)(arrays, seeds=draws.values)
        outputs = {name: ops.convert_to_numpy(x) for name, x in outputs.items()}
    outputs = result_arrays(outputs, prompts, control.num_samples, strip_prompt)
    if lm.preprocessor is not None:
        texts = lm.preprocessor.generate_postprocess(outputs)
        outputs = {"text": np.array(texts, object), **outputs}
    if several:
        outputs = {name: x.reshape(-1, control.num_samples, *x.shape[1:]) for name, x in outputs.items()}
    if np.ndim(batch["encoder_token_ids"]) == 1:
        outputs = {name: x[0] for name, x in outputs.items()}
    if lm.preprocessor is not None:
        text = outputs["text"]
        outputs["text"] = text.tolist() if isinstance(text, np.ndarray) else text
    return outputs["text"] if lm.preprocessor is not None and not control.log_probs else outputs


def control_of(lm, prompts, *, stop_token_ids, processors=(), **options):
    """The `Control` of options that fit the prompts and the sampler."""
    vocabulary_size = lm.backbone.config.vocabulary_size
    rooms = prompts["limits"] - prompts["decoder_padding_mask"].sum(axis=1)
    check_processors(processors, Request(vocabulary_size, rooms, stop_token_ids))
    control = Control(stop_token_ids, processors=tuple(processors), **options)
    check_sampler(lm.sampler, control, vocabulary_size)
    return control


def stop_ids(lm, stop_token_ids):
    """`stop_token_ids` of `generate`, checked: a tuple of ids, or None."""
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


def generate_program(lm, control):
    """The compiled `generate_step` for a `Control`."""

    def make():
        return Program(partial(generate_step, lm, control=control), lm, seeds=lm.sampler.variables, decodes=True)

    return lm.programs.get(("generate", control), make)


def generate_step(lm, inputs, stop_token_ids=None, control=None):
    """Generates for one batch of arrays; compiled as a whole where the backend compiles.

    Args:
        inputs: `encoder_token_ids` and `encoder_padding_mask` [B, S]; `decoder_token_ids` and
            `decoder_padding_mask` [B, L], prompts padded on the right; optionally `prefill` [P], whose length says
            how many positions to run at once before the loop; optionally `limits` [B], the most tokens of each row.
        stop_token_ids: ids that end a row, or None.
        control: a `Control`, to ask for more than `stop_token_ids`, and instead of them.

    Returns:
        `{"decoder_token_ids", "decoder_padding_mask"}`, both [B n, L], n samples for each prompt, and `log_probs`
        where the control asks for them.
    """
    encoder_mask, token_ids = inputs["encoder_padding_mask"], inputs["decoder_token_ids"]
    encoder, decoder = lm.backbone.encoder, lm.backbone.decoder
    prefill = inputs["prefill"].shape[0] if "prefill" in inputs else 0
    encoder_output = encoder(inputs["encoder_token_ids"], encoder_mask, training=False)
    token_ids, mask, log_probs = decode(
        lm.recorded_step,
        lm.sampler,
        token_ids,
        inputs["decoder_padding_mask"],
        decoder.start_cache(encoder_output, encoder_mask, token_ids.shape[1], _ahead(lm, prefill)),
        prefill=prefill,
        limits=inputs.get("limits"),
        control=control or Control(stop_token_ids),
        model=lm,
    )
    outputs = {"decoder_token_ids": token_ids, "decoder_padding_mask": mask}
    return outputs if log_probs is None else {**outputs, "log_probs": log_probs}


def decoding_step(lm, token_ids, cache, index):
    """`(logits [B, T, V], hidden states [B, T, D], cache)` of the tokens [B, T] from position `index` on."""
    hidden, cache = lm.backbone.decoder.step(token_ids, ops.ones_like(token_ids), cache, index)
    return lm.head(hidden), hidden, cache


def _ahead(lm, prefill):
    """The most tokens of a decoding step; None where a sampler reads whole sequences at once."""
    return None if isinstance(lm.sampler, keras_hub.samplers.ContrastiveSampler) else prefill


def _joined(results):
    """The results of several batches as one, arrays of different length filled up with zeros."""
    if isinstance(results[0], list):
        return [text for texts in results for text in texts]
    joined = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name == "text":
            joined[name] = _joined(parts)
            continue
        width = max(part.shape[-1] for part in parts)
        parts = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in parts]
        joined[name] = np.concatenate(parts)
    return joined
