"""The decoding loop over one cached step."""

import copy
import dataclasses
from collections.abc import Callable

import keras_hub
from keras import ops, tree

from keras_t5gemma.inference.decoding.stopping import is_stop, output_mask
from keras_t5gemma.inference.logits_processors import Sequences, in_order
from keras_t5gemma.inference.samplers import SAMPLERS
from keras_t5gemma.inference.samplers.beam import BeamSampler
from keras_t5gemma.inference.samplers.top_k_top_p import with_own_loop
from keras_t5gemma.suggestions import check_choice


@dataclasses.dataclass(frozen=True)
class Control:
    """What is asked of a decoding run and is part of its program: equal ones share one.

    Attributes:
        stop_token_ids: a tuple of the ids that end a row, or None.
        processors: a tuple of logits processors.
        num_samples: n, sequences for each prompt.
        log_probs: whether the tokens' log-probabilities are wanted.
    """

    stop_token_ids: tuple[int, ...] | None = None
    processors: tuple[Callable, ...] = ()
    num_samples: int = 1
    log_probs: bool = False


def resolve_sampler(sampler):
    """The sampler for a name or an instance, keras-hub's beam search exchanged for ours.

    Raises:
        ValueError: if it is not a sampler, its temperature not positive, or a beam search asked to return all beams.
    """
    if isinstance(sampler, str):
        # keras-hub's `get` returns a name that it does not know as it is.
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


def check_sampler(sampler, control, vocabulary_size):
    """Checks that a sampler can do what is asked.

    Raises:
        ValueError: if it cannot; the message says which argument of `generate` to leave out, or what would work.
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
        step: `(ids [B, T], cache, index) -> (logits [B, T, V], hidden states [B, T, D], cache)`, index being the
            position of the first id.
        sampler: a `keras_hub.samplers.Sampler`.
        token_ids: int [B, L], prompts of any length, padded on the right.
        prompt_mask: bool [B, L], True at prompt tokens.
        cache: nested structure of tensors, the batch first in each.
        prefill: how many positions to run in one call before the loop; what lies beyond a row's prompt is run again.
        limits: int [B], the most tokens of a row with its prompt, 0 for one that never runs; L if None.
        control: a `Control`; one without stop ids if None.
        model: the model whose variables `step` reads.

    Returns:
        `(token_ids, mask, log_probs)`, each [B n, L], an example's n samples together: the sequences; which positions
        belong to them; and float32 log-probabilities of what was generated, where `control` asks for them, else None.
    """
    control = control or Control()
    prompt_mask = ops.cast(prompt_mask, "bool")
    hidden_states = None
    if isinstance(sampler, keras_hub.samplers.ContrastiveSampler):
        prefill = token_ids.shape[1]  # it compares each candidate with every earlier hidden state
    if prefill:
        _, hidden_states, cache = step(token_ids[:, :prefill], cache, 0)

    next = _next(step)
    samples = control.num_samples
    if samples > 1 and not isinstance(sampler, BeamSampler):
        # After the prompts were read, once each. A beam search makes room for its beams itself.
        token_ids, prompt_mask, cache, limits = _repeat((token_ids, prompt_mask, cache, limits), samples)
    process = _processing(control, prompt_mask, limits)
    index = ops.min(ops.sum(ops.cast(prompt_mask, "int32"), axis=1))
    common = {"prompt": token_ids, "cache": cache, "index": index, "mask": prompt_mask, "model": model}
    common["stop_token_ids"] = control.stop_token_ids
    log_probs = None
    if isinstance(sampler, BeamSampler):
        best = sampler.search(next, process=process, limits=limits, log_probs=control.log_probs, **common)
        best = {name: ops.reshape(x[:, :samples], (-1, x.shape[2])) for name, x in best.items()}
        token_ids, log_probs = best["token_ids"], best.get("log_probs")
        prompt_mask, limits = _repeat((prompt_mask, limits), samples)
    elif has_common_loop(sampler):
        state = start_state(token_ids, cache, index, limits, log_probs=control.log_probs)
        end, options = token_ids.shape[1], {"limits": limits, "control": control, "model": model}
        token_ids, *_, log_probs = run_tokens(step, sampler, state, end, prompt_mask=prompt_mask, **options)
        log_probs = log_probs if control.log_probs else None
    else:

        def processed(ids, cache, index):
            logits, hidden, cache = next(ids, cache, index)
            return logits if process is None else process(logits, ids, index), hidden, cache

        sampler = _ending(with_own_loop(sampler), limits, index)
        token_ids = sampler(next=processed, hidden_states=hidden_states, **common)
    return token_ids, output_mask(token_ids, prompt_mask, control.stop_token_ids, limits), log_probs


def caches_of_a_prompt(sampler, control):
    """How many sequences of a prompt have a cache while a sampler is at it."""
    if isinstance(sampler, BeamSampler):
        return sampler.num_beams
    return sampler.k if isinstance(sampler, keras_hub.samplers.ContrastiveSampler) else control.num_samples


def has_common_loop(sampler):
    """Whether a sampler chooses token after token, so that `run_tokens` is all of its loop."""
    return type(sampler).__call__ is keras_hub.samplers.Sampler.__call__


def _ending(sampler, limits, index):
    """A sampler that has a loop of its own and no room for limits, but ends at the last of them all the same."""
    if limits is None:
        return sampler
    ending = copy.copy(sampler)  # shares the variables

    def run_loop(*args, **kwargs):
        return sampler.run_loop(*args, **{**kwargs, "maximum_iterations": ops.max(limits) - index})

    ending.run_loop = run_loop
    return ending


def _repeat(structure, times):
    """Each row of each tensor so many times in a row."""
    if times == 1:
        return structure
    return tree.map_structure(lambda x: None if x is None else ops.repeat(x, times, axis=0), structure)


def _processing(control, prompt_mask, limits):
    """`(logits [R, V], ids [R, L], index) -> logits [R, V]` by all processors, R a multiple of B; None without any."""
    if not control.processors:
        return None
    prompt_lengths = ops.sum(ops.cast(prompt_mask, "int32"), axis=1)
    limits = ops.full_like(prompt_lengths, prompt_mask.shape[1]) if limits is None else limits

    def process(logits, token_ids, index):
        lengths = _repeat((prompt_lengths, limits), token_ids.shape[0] // prompt_lengths.shape[0])
        sequences = Sequences(token_ids, index, *lengths, control.stop_token_ids)
        for processor in in_order(control.processors):
            logits = processor(logits, sequences)
        return logits

    return process


def start_state(token_ids, cache, index, limits=None, *, log_probs=False):
    """What `run_tokens` carries, before its first token.

    Args:
        token_ids: int [B, L].
        cache: nested structure of tensors.
        index: the first position to fill.
        limits: as for `decode`.
        log_probs: whether log-probabilities are wanted.

    Returns:
        `(token_ids, cache, index, running, log_probs)`: `running` is bool [B], False for a row that has ended, and
        `log_probs` [B, L], or empty.
    """
    running = ops.ones((token_ids.shape[0],), dtype="bool") if limits is None else ops.less(index, limits)
    log_probs = ops.zeros(token_ids.shape, "float32") if log_probs else ()
    return token_ids, cache, ops.cast(index, "int32"), running, log_probs


def run_tokens(step, sampler, state, end, *, prompt_mask, control, limits=None, model=None):
    """The loop of every sampler that chooses token after token: keras-hub's own, with what it has no room for.

    Args:
        step: as for `decode`.
        sampler: a sampler with `has_common_loop`.
        state: from `start_state` or an earlier call.
        end: the position to stop before, an int or a scalar tensor; at most L.
        prompt_mask: as for `decode`.
        control: as for `decode`.
        limits: as for `decode`.
        model: as for `decode`.

    Returns:
        The state after it, every row ended or `end` reached.
    """
    process = _processing(control, prompt_mask, limits)
    next = _next(step)

    def cond(*state):
        return ops.any(state[3])

    def body(token_ids, cache, index, running, log_probs):
        logits, _, cache = next(token_ids, cache, index)
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
        return token_ids, cache, index + 1, ops.logical_and(running, ops.logical_not(stops)), log_probs

    # A tuple, as it came: a list would be another program.
    run_loop = with_own_loop(sampler).run_loop
    return tuple(run_loop(cond, body, model=model, loop_vars=state, maximum_iterations=end - state[2]))


def _choose(sampler, logits):
    """The next token of each row, [B] of [B, V]."""
    if type(sampler) is keras_hub.samplers.GreedySampler:
        return ops.argmax(logits, axis=-1)  # what its probabilities would say, without a softmax over the vocabulary
    return sampler.get_next_token(sampler.compute_probabilities(logits))


def _next(step):
    """`step` for the last token before a position, as samplers call it: `(ids [R, L], cache, index) -> ...`."""

    def next(ids, cache, index):
        last = ops.slice(ids, [0, index - 1], [ops.shape(ids)[0], 1])
        logits, hidden, cache = step(last, cache, index - 1)
        return ops.squeeze(logits, 1), ops.squeeze(hidden, 1), cache

    return next


def token_log_probs(logits, token_ids):
    """Log-probabilities [B, M] of tokens [B, M], each by the logits of its row in [B, V], in float32."""
    logits = ops.cast(logits, "float32")
    return ops.take_along_axis(logits, token_ids, axis=1) - ops.logsumexp(logits, axis=1, keepdims=True)
