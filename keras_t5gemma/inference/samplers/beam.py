"""Beam search that gives each example the same result whatever batch it is in."""

import keras
import keras_hub
from keras import ops, tree

from keras_t5gemma.checks import integer
from keras_t5gemma.inference.decoding.stopping import is_stop

# Score of a beam that does not exist yet: far below any sum of log-probabilities, and finite.
_NO_BEAM = -1e9


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class BeamSampler(keras_hub.samplers.Sampler):
    """Beam search with finished beams set aside, as in `transformers` with its default options.

    keras-hub's own sampler keeps extending a beam after its stop token and scores what follows, and counts the tokens
    of a longer prompt as chosen; so there a result depends on the other examples in the batch. Here a beam that stops
    is stored with its score, `sum of log-probabilities / generated_length ** length_penalty`, the search of an example
    ends when none of its running beams can beat the worst stored one at its present length, and prompts cost nothing.

    Args:
        num_beams: W, beams kept for each example.
        length_penalty: exponent of the length; above 1 favours long outputs, 0 ignores length.
        temperature: logits are divided by it.

    Raises:
        ValueError: if `num_beams` is not a positive integer.
    """

    def __init__(self, num_beams=5, length_penalty=1.0, **kwargs):
        super().__init__(**kwargs)
        self.num_beams = integer(num_beams, "num_beams")
        self.length_penalty = length_penalty

    def __call__(
        self, next, prompt, cache=None, index=0, mask=None, stop_token_ids=None, hidden_states=None, model=None
    ):
        """Searches.

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
        """Searches, and gives all that was stored.

        Args:
            next: as for a call.
            prompt: as for a call.
            cache: as for a call.
            index: as for a call.
            mask: as for a call.
            stop_token_ids: as for a call.
            limits: int [B], the most tokens of an example's sequences, 0 for one that is never open; L if None.
            process: `(log-probabilities [B*W, V], ids [B*W, L], index) -> scores [B*W, V]`, what processors make of a
                step's log-probabilities, or None. As in `transformers`, scores need not add up to a whole.
            log_probs: whether the tokens' log-probabilities are wanted, before processors and temperature.
            model: as for a call.

        Returns:
            A dict of `token_ids`, int [B, W, L], the best sequence first, and, where wanted, `log_probs` [B, W, L].
        """
        width, (batch, length) = self.num_beams, ops.shape(prompt)
        prompt_lengths = ops.sum(ops.cast(mask, "int32"), axis=1)
        running = {"token_ids": ops.repeat(ops.expand_dims(prompt, 1), width, axis=1)}
        if log_probs:
            running["log_probs"] = ops.zeros((batch, width, length), "float32")
        # All beams of an example are equal at first; only the first may be extended.
        scores = ops.tile(ops.convert_to_tensor([[0.0] + [_NO_BEAM] * (width - 1)], "float32"), (batch, 1))
        cache = tree.map_structure(lambda x: ops.repeat(x, width, axis=0), cache)
        stored_scores = ops.full((batch, width), _NO_BEAM, "float32")
        # Stop ids can take up to W candidates each, and W must be left to run on.
        kept = width * (1 + max(1, len(stop_token_ids or ())))
        rows = ops.expand_dims(ops.arange(batch, dtype="int32") * width, 1)

        def cond(*state):
            return ops.any(state[-1])

        def body(running, cache, index, scores, stored, stored_scores, is_open):
            ids = ops.reshape(running["token_ids"], (-1, length))
            logits, _, cache = next(ids, cache, index)
            logits = ops.cast(logits, "float32")
            step_scores = ops.log_softmax(logits / self.temperature)
            if process is not None:
                step_scores = process(step_scores, ids, index)
            totals, beams, candidates = _candidates(running, logits, step_scores, scores, index, kept)
            tokens = ops.take(candidates["token_ids"], index, axis=2)
            last = ops.equal(index, length - 1 if limits is None else ops.expand_dims(limits - 1, 1))
            stops = ops.logical_or(is_stop(tokens, stop_token_ids), last)

            # Best W of those stored before and those that stop now; only the W best candidates may stop.
            generated = ops.cast(ops.expand_dims(ops.maximum(index + 1 - prompt_lengths, 1), 1), "float32")
            forced = ops.take(mask, index, axis=1)
            may_stop = ops.logical_and(is_open, ops.logical_not(forced))
            may_stop = ops.logical_and(ops.expand_dims(may_stop, 1), ops.arange(kept, dtype="int32") < width)
            penalized = totals / generated**self.length_penalty
            penalized = ops.where(
                ops.logical_and(stops, may_stop), penalized, ops.convert_to_tensor(_NO_BEAM, "float32")
            )
            merged = ops.concatenate([stored_scores, penalized], axis=1)
            stored_scores, chosen = ops.top_k(merged, width)
            stored = {
                name: _gather(ops.concatenate([stored[name], x], axis=1), chosen) for name, x in candidates.items()
            }

            # Best W of those that run on; where the prompt dictates the token, every beam just takes it.
            going = ops.where(stops, totals + _NO_BEAM, totals)
            going, chosen = ops.top_k(going, width)
            forced = ops.expand_dims(forced, 1)
            scores = ops.where(forced, scores, going)
            parents = ops.take_along_axis(beams, ops.cast(chosen, "int32"), axis=1)
            parents = ops.where(forced, ops.arange(width, dtype="int32"), parents)
            running = {
                name: ops.where(ops.expand_dims(forced, 2), running[name], _gather(x, chosen))
                for name, x in candidates.items()
            }
            order = ops.reshape(rows + parents, (-1,))
            cache = tree.map_structure(lambda x: ops.take(x, order, axis=0), cache)

            best_running = ops.max(scores, axis=1, keepdims=True) / generated**self.length_penalty
            improvable = ops.any(best_running > ops.min(stored_scores, axis=1, keepdims=True), axis=1)
            is_open = ops.logical_and(is_open, ops.logical_or(improvable, ops.squeeze(forced, 1)))
            if limits is not None:
                is_open = ops.logical_and(is_open, index + 1 < limits)
            return running, cache, index + 1, scores, stored, stored_scores, is_open

        index = ops.cast(index, "int32")
        is_open = ops.ones((batch,), dtype="bool") if limits is None else index < limits
        state = (running, cache, index, scores, running, stored_scores, is_open)
        state = self.run_loop(cond, body, model=model, loop_vars=state, maximum_iterations=length - index)
        return state[4]

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "num_beams": self.num_beams, "length_penalty": self.length_penalty}


def _candidates(running, logits, step_scores, scores, index, kept):
    """The best extensions of an example's beams by one token.

    Args:
        running: the beams, a dict of `token_ids` and perhaps `log_probs`, [B, W, L] each.
        logits: [B*W, V].
        step_scores: [B*W, V], what each token adds to its beam's score.
        scores: [B, W], of the beams.
        index: the token's position.
        kept: M, extensions of an example.

    Returns:
        `(scores, beams, candidates)`: [B, M], best first; the beams that they extend, int [B, M]; and the extended
        beams, [B, M, L] each.
    """
    batch, width, _ = running["token_ids"].shape
    vocabulary_size = logits.shape[-1]
    totals = ops.reshape(step_scores, (batch, width, vocabulary_size)) + ops.expand_dims(scores, 2)
    totals, flat = ops.top_k(ops.reshape(totals, (batch, width * vocabulary_size)), kept)
    flat = ops.cast(flat, "int32")
    beams, tokens = flat // vocabulary_size, flat % vocabulary_size
    new = {"token_ids": ops.cast(tokens, running["token_ids"].dtype)}
    if "log_probs" in running:
        log_probs = ops.reshape(ops.log_softmax(logits), (batch, width * vocabulary_size))
        new["log_probs"] = ops.take_along_axis(log_probs, flat, axis=1)
    candidates = {
        name: ops.slice_update(_gather(running[name], beams), [0, 0, index], ops.expand_dims(x, 2))
        for name, x in new.items()
    }
    return totals, beams, candidates


def _gather(sequences, beams):
    """Sequences [B, W, L] of the beams [B, M], as [B, M, L]."""
    return ops.take_along_axis(sequences, ops.expand_dims(ops.cast(beams, "int32"), 2), axis=1)
