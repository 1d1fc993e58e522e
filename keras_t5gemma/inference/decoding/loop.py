"""The decoding loop over one cached step."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import keras_hub
from keras import ops, tree

from keras_t5gemma.inference.decoding.stopping import is_stop, output_mask
from keras_t5gemma.inference.logits_processors import Sequences, application_order
from keras_t5gemma.inference.samplers import SAMPLERS
from keras_t5gemma.inference.samplers.beam import BeamSampler
from keras_t5gemma.inference.samplers.top_k_top_p import with_own_loop
from keras_t5gemma.suggestions import check_choice


@dataclasses.dataclass(frozen=True)
class Control:
    """Options of a decoding run that are part of its program: runs with equal controls share a program.

    Attributes:
        stop_token_ids: a tuple of the ids that end a row, or None.
        processors: a tuple of logits processors.
        num_samples: n, sequences per prompt.
        log_probs: whether to return the tokens' log-probabilities.
    """

    stop_token_ids: tuple[int, ...] | None = None
    processors: tuple[Callable, ...] = ()
    num_samples: int = 1
    log_probs: bool = False


class DecodingState(NamedTuple):
    """State of `run_tokens` between two tokens: B rows, L positions.

    Attributes:
        token_ids: int [B, L].
        cache: nested structure of tensors, the batch first in each.
        index: int scalar, the next position to fill.
        running: bool [B], False for a row that has ended.
        log_probs: float32 [B, L], or an empty tuple if they are not requested.
    """

    token_ids: Any
    cache: Any
    index: Any
    running: Any
    log_probs: Any


def resolve_sampler(sampler: str | keras_hub.samplers.Sampler) -> keras_hub.samplers.Sampler:
    """The sampler for a name or an instance; keras-hub's beam search is replaced by ours.

    Raises:
        ValueError: if `sampler` is not a sampler, its temperature is not positive, or it is a beam search that returns
            all beams.
    """
    if isinstance(sampler, str):
        # keras-hub's `get` returns an unknown name unchanged.
        check_choice(sampler, "sampler", SAMPLERS, others=", or a keras_hub.samplers.Sampler")
        sampler = BeamSampler() if sampler == "beam" else keras_hub.samplers.get(sampler)
    if isinstance(sampler, keras_hub.samplers.BeamSampler):
        if sampler.return_all_beams:
            raise ValueError("`return_all_beams=True` is not available: `generate(num_samples=n)` gives the n best.")
        sampler = BeamSampler(num_beams=sampler.num_beams, temperature=sampler.temperature)
    if not isinstance(sampler, keras_hub.samplers.Sampler):
        raise ValueError(f"`sampler` must be a name or a keras_hub.samplers.Sampler. Received: {sampler!r}.")
    if not sampler.temperature > 0:
        raise ValueError(f"The sampler's `temperature` must be above 0. Received: {sampler.temperature!r}.")
    return sampler


def check_sampler(sampler: keras_hub.samplers.Sampler, control: Control, vocabulary_size: int) -> None:
    """Checks that a sampler supports the options of a run.

    Args:
        sampler: the sampler that the model was compiled with.
        control: the options.
        vocabulary_size: V.

    Raises:
        ValueError: if it does not; the message names the argument of `generate` to leave out, or a sampler that works.
    """
    name, samples = type(sampler).__name__, control.num_samples
    is_beam = isinstance(sampler, BeamSampler)
    if (k := getattr(sampler, "k", None)) is not None and k > vocabulary_size:
        raise ValueError(f"The sampler's `k` must be at most {vocabulary_size}, the vocabulary. Received: k={k}.")
    if is_beam and samples > sampler.num_beams:
        raise ValueError(
            f"`num_samples` must be at most {sampler.num_beams}, the sampler's `num_beams`. Received: {samples}."
        )
    if samples > 1 and not is_beam and not sampler.variables:
        raise ValueError(
            f"`num_samples` needs a sampler that draws at random, or beam search, and {name} would give the same "
            f"{samples} times. Compile the model with `sampler=kt.TopKTopPSampler(...)`, for one."
        )
    if control.processors and isinstance(sampler, keras_hub.samplers.ContrastiveSampler):
        raise ValueError(f"`processors` are not available with {name}, which also scores tokens that they rule out.")
    if control.log_probs and not is_beam and not has_common_loop(sampler):
        raise ValueError(f"`return_log_probs` is not available with {name}: pass what it generates to `score()`.")


def decode(step, sampler, token_ids, prompt_mask, cache, *, prefill=0, limits=None, control=None, model=None):
    """Continues prompts until every row has stopped or the length is reached.

    Args:
        step: `(ids [B, T], cache, index) -> (logits [B, T, V], hidden states [B, T, D], cache)`; `index` is the
            position of the first id.
        sampler: a `keras_hub.samplers.Sampler`.
        token_ids: int [B, L], prompts of any length, padded on the right.
        prompt_mask: bool [B, L], True at prompt tokens.
        cache: nested structure of tensors, the batch first in each.
        prefill: how many positions to run in one call before the loop; positions beyond a row's prompt are run again.
        limits: int [B], the maximum length of a row in tokens with its prompt, 0 for a row that never runs; L if None.
        control: a `Control`; one without stop ids if None.
        model: the model whose variables `step` reads.

    Returns:
        `(token_ids, mask, log_probs)`, each [B n, L], an example's n samples next to each other: the sequences; the
        mask of the positions that belong to them; and float32 log-probabilities of the generated tokens, or None if
        `control` does not request them.
    """
    control = control or Control()
    prompt_mask = ops.cast(prompt_mask, "bool")
    hidden_states = None
    if isinstance(sampler, keras_hub.samplers.ContrastiveSampler):
        prefill = token_ids.shape[1]  # it compares each candidate with every earlier hidden state
    if prefill:
        _, hidden_states, cache = step(token_ids[:, :prefill], cache, 0)

    next_logits = _next_logits(step)
    samples = control.num_samples
    if samples > 1 and not isinstance(sampler, BeamSampler):
        # Repeated after the prompts were read, so that each is read once. A beam search repeats rows for its beams
        # itself.
        token_ids, prompt_mask, cache, limits = repeated((token_ids, prompt_mask, cache, limits), samples)
    process = _chained_processors(control, prompt_mask, limits)
    index = ops.min(ops.sum(ops.cast(prompt_mask, "int32"), axis=1))
    common = {"prompt": token_ids, "cache": cache, "index": index, "mask": prompt_mask, "model": model}
    common["stop_token_ids"] = control.stop_token_ids
    log_probs = None
    if isinstance(sampler, BeamSampler):
        beams = sampler.search(next_logits, process=process, limits=limits, log_probs=control.log_probs, **common)
        best = {name: ops.reshape(x[:, :samples], (-1, x.shape[2])) for name, x in beams.items()}
        token_ids, log_probs = best["token_ids"], best.get("log_probs")
        prompt_mask, limits = repeated((prompt_mask, limits), samples)
    elif has_common_loop(sampler):
        state = start_state(token_ids, cache, index, limits, log_probs=control.log_probs)
        end, options = token_ids.shape[1], {"limits": limits, "control": control, "model": model}
        state = run_tokens(step, sampler, state, end, prompt_mask=prompt_mask, **options)
        token_ids, log_probs = state.token_ids, state.log_probs if control.log_probs else None
    else:

        def next_processed(ids, cache, index):
            logits, hidden, cache = next_logits(ids, cache, index)
            return logits if process is None else process(logits, ids, index), hidden, cache

        sampler = _with_limits(with_own_loop(sampler), limits, index)
        token_ids = sampler(next=next_processed, hidden_states=hidden_states, **common)
    return token_ids, output_mask(token_ids, prompt_mask, control.stop_token_ids, limits), log_probs


def caches_of_a_prompt(sampler: keras_hub.samplers.Sampler, control: Control) -> int:
    """The number of sequences per prompt that have a cache while a sampler runs."""
    if isinstance(sampler, BeamSampler):
        return sampler.num_beams
    return sampler.k if isinstance(sampler, keras_hub.samplers.ContrastiveSampler) else control.num_samples


def has_common_loop(sampler: keras_hub.samplers.Sampler) -> bool:
    """Whether a sampler chooses one token after the other, so that `run_tokens` can replace its loop."""
    return type(sampler).__call__ is keras_hub.samplers.Sampler.__call__


def _with_limits(sampler, limits, index):
    """A copy of a sampler that stops at the largest of the limits; the sampler itself if there are none.

    Samplers with a loop of their own do not take limits per row, but their loop takes a maximum of iterations.
    """
    if limits is None:
        return sampler
    limited = copy.copy(sampler)  # shares the variables

    def run_loop(*args, **kwargs):
        return sampler.run_loop(*args, **{**kwargs, "maximum_iterations": ops.max(limits) - index})

    limited.run_loop = run_loop
    return limited


def repeated(structure, times):
    """Repeats each row of each tensor, the copies of a row next to each other."""
    if times == 1:
        return structure
    return tree.map_structure(lambda x: None if x is None else ops.repeat(x, times, axis=0), structure)


def _chained_processors(control, prompt_mask, limits):
    """All processors as one function `(logits [R, V], ids [R, L], index) -> logits [R, V]`; None if there are none.

    R is a multiple of B, as in a beam search.
    """
    if not control.processors:
        return None
    prompt_lengths = ops.sum(ops.cast(prompt_mask, "int32"), axis=1)
    limits = ops.full_like(prompt_lengths, prompt_mask.shape[1]) if limits is None else limits

    def process(logits, token_ids, index):
        lengths = repeated((prompt_lengths, limits), token_ids.shape[0] // prompt_lengths.shape[0])
        sequences = Sequences(token_ids, index, *lengths, control.stop_token_ids)
        for processor in application_order(control.processors):
            logits = processor(logits, sequences)
        return logits

    return process


def start_state(token_ids, cache, index, limits=None, *, log_probs=False):
    """The `DecodingState` before the first token.

    Args:
        token_ids: int [B, L].
        cache: nested structure of tensors.
        index: the first position to fill.
        limits: as for `decode`.
        log_probs: whether to record log-probabilities.
    """
    running = ops.ones((token_ids.shape[0],), dtype="bool") if limits is None else ops.less(index, limits)
    log_probs = ops.zeros(token_ids.shape, "float32") if log_probs else ()
    return DecodingState(token_ids, cache, ops.cast(index, "int32"), running, log_probs)


def run_tokens(step, sampler, state, end, *, prompt_mask, control, limits=None, model=None):
    """The loop of every sampler that chooses one token after the other.

    It is keras-hub's loop with processors, limits and log-probabilities added.

    Args:
        step: as for `decode`.
        sampler: a sampler with `has_common_loop`.
        state: a `DecodingState`, from `start_state` or an earlier call.
        end: the position to stop before, an int or a scalar tensor; at most L.
        prompt_mask: as for `decode`.
        control: as for `decode`.
        limits: as for `decode`.
        model: as for `decode`.

    Returns:
        The `DecodingState` in which every row has ended or `end` is reached.
    """
    process = _chained_processors(control, prompt_mask, limits)
    next_logits = _next_logits(step)

    # `run_loop` passes the fields one by one.
    def cond(*fields):
        return ops.any(DecodingState(*fields).running)

    def body(token_ids, cache, index, running, log_probs):
        logits, _, cache = next_logits(token_ids, cache, index)
        processed = logits if process is None else process(logits, token_ids, index)
        chosen = _choose(sampler, processed)
        from_prompt = ops.take(prompt_mask, index, axis=1)
        chosen = ops.where(from_prompt, ops.take(token_ids, index, axis=1), ops.cast(chosen, token_ids.dtype))
        chosen = ops.expand_dims(chosen, 1)
        token_ids = ops.slice_update(token_ids, [0, index], chosen)
        stops = ops.logical_and(is_stop(chosen[:, 0], control.stop_token_ids), ops.logical_not(from_prompt))
        if limits is not None:
            stops = ops.logical_or(stops, index + 1 >= limits)
        if control.log_probs:
            log_probs = ops.slice_update(log_probs, [0, index], token_log_probs(logits, chosen))
        running = ops.logical_and(running, ops.logical_not(stops))
        return DecodingState(token_ids, cache, index + 1, running, log_probs)

    run_loop = with_own_loop(sampler).run_loop
    return DecodingState(*run_loop(cond, body, model=model, loop_vars=state, maximum_iterations=end - state.index))


def _choose(sampler, logits):
    """The next token of each row, [B], from logits [B, V]."""
    if type(sampler) is keras_hub.samplers.GreedySampler:
        return ops.argmax(logits, axis=-1)  # the same token as by its probabilities, without a softmax over V
    return sampler.get_next_token(sampler.compute_probabilities(logits))


def _next_logits(step):
    """`step` of the token before a position, in the form that samplers call.

    Args:
        step: as for `decode`.

    Returns:
        `(ids [R, L], cache, index) -> (logits [R, V], hidden states [R, D], cache)`.
    """

    def next_logits(ids, cache, index):
        last = ops.slice(ids, [0, index - 1], [ops.shape(ids)[0], 1])
        logits, hidden, cache = step(last, cache, index - 1)
        return ops.squeeze(logits, 1), ops.squeeze(hidden, 1), cache

    return next_logits


def token_log_probs(logits, token_ids):
    """Log-probabilities [B, M] of tokens [B, M] by the logits [B, V] of their rows, in float32."""
    logits = ops.cast(logits, "float32")
    return ops.take_along_axis(logits, token_ids, axis=1) - ops.logsumexp(logits, axis=1, keepdims=True)
