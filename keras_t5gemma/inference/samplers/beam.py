"""Beam search that gives each example the same result, whatever batch it is in."""

from typing import Any, NamedTuple

import keras
import keras_hub
from keras import ops, tree

from keras_t5gemma.checks import integer
from keras_t5gemma.inference.decoding.stopping import is_stop

# Score of a beam that does not exist yet: far below any sum of log-probabilities, and finite.
_NO_BEAM = -1e9


class BeamState(NamedTuple):
    """State of a beam search between two steps: B examples, W beams per example, L positions.

    Attributes:
        running: the beams that are still extended, a dict of `token_ids`, int [B, W, L], and perhaps `log_probs`,
            float32 [B, W, L].
        cache: nested structure of tensors [B*W, ...], the cache of the running beams.
        index: int scalar, the position that the next step fills.
        scores: float32 [B, W], the sum of log-probabilities of each running beam.
        stored: the finished beams, a dict like `running`, the best first.
        stored_scores: float32 [B, W], the scores of the finished beams, with the length penalty; `_NO_BEAM` if there is
            no such beam yet.
        is_open: bool [B], whether the search of an example continues.
    """

    running: dict[str, Any]
    cache: Any
    index: Any
    scores: Any
    stored: dict[str, Any]
    stored_scores: Any
    is_open: Any


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class BeamSampler(keras_hub.samplers.Sampler):
    """Beam search with finished beams set aside, as in `transformers` with its default options.

    keras-hub's own sampler keeps extending a beam after its stop token, scores the tokens that follow it, and counts
    the tokens of a longer prompt as chosen. So its result depends on the other examples in the batch. Here a beam that
    stops is stored with its score, `sum of log-probabilities / generated_length ** length_penalty`. The search of an
    example ends when none of its running beams can beat the worst stored one at its present length. The tokens of a
    prompt add nothing to a score.

    Args:
        num_beams: W, beams per example.
        length_penalty: exponent of the length; above 1 favors long outputs, 0 ignores length.
        temperature: logits are divided by it.

    Raises:
        ValueError: if `num_beams` is not a positive integer.
    """

    def __init__(self, num_beams: int = 5, length_penalty: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.num_beams = integer(num_beams, "num_beams")
        self.length_penalty = length_penalty

    def __call__(
        self, next, prompt, cache=None, index=0, mask=None, stop_token_ids=None, hidden_states=None, model=None
    ):
        """Searches, and returns the best beam.

        Args:
            next: `(ids [B*W, L], cache, index) -> (logits [B*W, V], hidden states, cache)` for position `index`.
            prompt: int [B, L], prompts padded to the full length.
            cache: nested structure of tensors, the batch first in each.
            index: the first position to fill.
            mask: bool [B, L], True at prompt tokens.
            stop_token_ids: ids that end a sequence, or None.
            hidden_states: unused; other samplers take it.
            model: the model whose variables `next` reads; JAX's loop carries them.

        Returns:
            int [B, L], the best sequence for each prompt.
        """
        del hidden_states
        best = self.search(next, prompt, cache, index, mask, stop_token_ids=stop_token_ids, model=model)
        return best["token_ids"][:, 0]

    def search(
        self,
        next,
        prompt,
        cache,
        index,
        mask,
        *,
        stop_token_ids=None,
        limits=None,
        process=None,
        log_probs=False,
        model=None,
    ):
        """Searches, and returns all finished beams.

        Args:
            next: as for a call.
            prompt: as for a call.
            cache: as for a call.
            index: as for a call.
            mask: as for a call.
            stop_token_ids: as for a call.
            limits: int [B], the maximum length of an example's sequences in tokens, 0 for an example that is never
                searched; L if None.
            process: `(log-probabilities [B*W, V], ids [B*W, L], index) -> scores [B*W, V]`, which applies the logits
                processors to a step's log-probabilities, or None. As in `transformers`, the scores need not be
                normalized.
            log_probs: whether to return the tokens' log-probabilities too, those before processors and temperature.
            model: as for a call.

        Returns:
            A dict of `token_ids`, int [B, W, L], the best sequence first, and, if requested, `log_probs` [B, W, L].
        """
        width, (batch, length) = self.num_beams, ops.shape(prompt)
        running = {"token_ids": ops.repeat(ops.expand_dims(prompt, 1), width, axis=1)}
        if log_probs:
            running["log_probs"] = ops.zeros((batch, width, length), "float32")
        index = ops.cast(index, "int32")
        state = BeamState(
            running=running,
            cache=tree.map_structure(lambda x: ops.repeat(x, width, axis=0), cache),
            index=index,
            # All beams of an example are equal at first; only the first may be extended.
            scores=ops.tile(ops.convert_to_tensor([[0.0] + [_NO_BEAM] * (width - 1)], "float32"), (batch, 1)),
            stored=running,
            stored_scores=ops.full((batch, width), _NO_BEAM, "float32"),
            is_open=ops.ones((batch,), dtype="bool") if limits is None else index < limits,
        )
        prompt_lengths = ops.sum(ops.cast(mask, "int32"), axis=1)

        # `run_loop` passes the fields one by one.
        def cond(*fields):
            return ops.any(BeamState(*fields).is_open)

        def body(*fields):
            state = BeamState(*fields)
            return self._step(state, next, mask, prompt_lengths, stop_token_ids, limits, process)

        fields = self.run_loop(cond, body, model=model, loop_vars=state, maximum_iterations=length - index)
        return BeamState(*fields).stored

    def _step(self, state, next, mask, prompt_lengths, stop_token_ids, limits, process):
        """Extends the running beams by one token and stores those that stop.

        Args:
            state: a `BeamState`.
            next: as for a call.
            mask: bool [B, L], True at prompt tokens.
            prompt_lengths: int [B], in tokens.
            stop_token_ids: as for a call.
            limits: as for `search`.
            process: as for `search`.

        Returns:
            The `BeamState` of the next position.
        """
        index, (batch, width, length) = state.index, ops.shape(state.running["token_ids"])
        ids = ops.reshape(state.running["token_ids"], (-1, length))
        logits, _, cache = next(ids, state.cache, index)
        logits = ops.cast(logits, "float32")
        step_scores = ops.log_softmax(logits / self.temperature)
        if process is not None:
            step_scores = process(step_scores, ids, index)
        # Stop ids can take up to W candidates each, and W candidates must be left to continue.
        count = width * (1 + max(1, len(stop_token_ids or ())))
        totals, parents, candidates = _candidates(state.running, logits, step_scores, state.scores, index, count)
        tokens = ops.take(candidates["token_ids"], index, axis=2)
        is_last = ops.equal(index, length - 1 if limits is None else ops.expand_dims(limits - 1, 1))
        stops = ops.logical_or(is_stop(tokens, stop_token_ids), is_last)
        forced = ops.take(mask, index, axis=1)
        generated = ops.cast(ops.expand_dims(ops.maximum(index + 1 - prompt_lengths, 1), 1), "float32")
        penalty = generated**self.length_penalty

        # Only the W best candidates may stop, and none while the prompt dictates the token.
        may_stop = ops.logical_and(state.is_open, ops.logical_not(forced))
        may_stop = ops.logical_and(ops.expand_dims(may_stop, 1), ops.arange(count, dtype="int32") < width)
        stopped = ops.logical_and(stops, may_stop)
        stopped_scores = ops.where(stopped, totals / penalty, ops.convert_to_tensor(_NO_BEAM, "float32"))
        stored, stored_scores = _best_stored(state, candidates, stopped_scores)

        forced = ops.expand_dims(forced, 1)
        running, scores, parents = _best_running(state, candidates, totals, parents, stops, forced)
        rows = ops.expand_dims(ops.arange(batch, dtype="int32") * width, 1)
        order = ops.reshape(rows + parents, (-1,))
        cache = tree.map_structure(lambda x: ops.take(x, order, axis=0), cache)

        best_running = ops.max(scores, axis=1, keepdims=True) / penalty
        improvable = ops.any(best_running > ops.min(stored_scores, axis=1, keepdims=True), axis=1)
        is_open = ops.logical_and(state.is_open, ops.logical_or(improvable, ops.squeeze(forced, 1)))
        if limits is not None:
            is_open = ops.logical_and(is_open, index + 1 < limits)
        return BeamState(running, cache, index + 1, scores, stored, stored_scores, is_open)

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {**super().get_config(), "num_beams": self.num_beams, "length_penalty": self.length_penalty}


def _candidates(running, logits, step_scores, scores, index, count):
    """The best extensions of an example's beams by one token.

    Args:
        running: the beams, a dict of `token_ids` and perhaps `log_probs`, [B, W, L] each.
        logits: [B*W, V].
        step_scores: [B*W, V], the amount that each token adds to its beam's score.
        scores: [B, W], the beams' scores.
        index: the token's position.
        count: M, extensions per example.

    Returns:
        `(totals, parents, candidates)`: the scores of the extended beams [B, M], the best first; the beams that they
        extend, int [B, M]; and the extended beams, a dict like `running`, [B, M, L] each.
    """
    batch, width, _ = running["token_ids"].shape
    vocabulary_size = logits.shape[-1]
    totals = ops.reshape(step_scores, (batch, width, vocabulary_size)) + ops.expand_dims(scores, 2)
    totals, flat = ops.top_k(ops.reshape(totals, (batch, width * vocabulary_size)), count)
    flat = ops.cast(flat, "int32")
    parents, tokens = flat // vocabulary_size, flat % vocabulary_size
    new = {"token_ids": ops.cast(tokens, running["token_ids"].dtype)}
    if "log_probs" in running:
        log_probs = ops.reshape(ops.log_softmax(logits), (batch, width * vocabulary_size))
        new["log_probs"] = ops.take_along_axis(log_probs, flat, axis=1)
    candidates = {
        name: ops.slice_update(_gather(running[name], parents), [0, 0, index], ops.expand_dims(x, 2))
        for name, x in new.items()
    }
    return totals, parents, candidates


def _best_stored(state, candidates, stopped_scores):
    """The best W of the beams that were stored before and the candidates that stop now.

    Args:
        state: a `BeamState`.
        candidates: a dict of sequences, [B, M, L] each.
        stopped_scores: [B, M], `_NO_BEAM` for a candidate that does not stop.

    Returns:
        `(stored, stored_scores)` of the next `BeamState`.
    """
    merged = ops.concatenate([state.stored_scores, stopped_scores], axis=1)
    stored_scores, chosen = ops.top_k(merged, state.stored_scores.shape[1])
    stored = {name: _gather(ops.concatenate([state.stored[name], x], axis=1), chosen) for name, x in candidates.items()}
    return stored, stored_scores


def _best_running(state, candidates, totals, parents, stops, forced):
    """The best W of the candidates that do not stop; if the prompt dictates the token, the beams as they are.

    Args:
        state: a `BeamState`.
        candidates: a dict of sequences, [B, M, L] each.
        totals: [B, M], the candidates' scores.
        parents: int [B, M], the beams that the candidates extend.
        stops: bool [B, M], whether a candidate stops.
        forced: bool [B, 1], whether the prompt dictates the token.

    Returns:
        `(running, scores)` of the next `BeamState`, and the beams that they extend, int [B, W].
    """
    width = state.scores.shape[1]
    continued, chosen = ops.top_k(ops.where(stops, totals + _NO_BEAM, totals), width)
    scores = ops.where(forced, state.scores, continued)
    parents = ops.take_along_axis(parents, ops.cast(chosen, "int32"), axis=1)
    parents = ops.where(forced, ops.arange(width, dtype="int32"), parents)
    running = {
        name: ops.where(ops.expand_dims(forced, 2), state.running[name], _gather(x, chosen))
        for name, x in candidates.items()
    }
    return running, scores, parents


def _gather(sequences, beams):
    """Sequences [B, W, L] of the beams [B, M], as [B, M, L]."""
    return ops.take_along_axis(sequences, ops.expand_dims(ops.cast(beams, "int32"), 2), axis=1)
