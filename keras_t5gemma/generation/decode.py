"""The decoding loop over one cached step."""

import keras_hub
from keras import ops

from keras_t5gemma.generation.beam_sampler import BeamSampler
from keras_t5gemma.generation.stopping import output_mask


def resolve_sampler(sampler):
    """The sampler for a name or an instance, keras-hub's beam search exchanged for ours.

    Raises:
        ValueError: where it is no sampler, or a beam search asked to return all beams.
    """
    if isinstance(sampler, str) and sampler == "beam":
        return BeamSampler()
    if isinstance(sampler, str):
        sampler = keras_hub.samplers.get(sampler)
    if isinstance(sampler, keras_hub.samplers.BeamSampler):
        if sampler.return_all_beams:
            raise ValueError("`generate()` returns one sequence a prompt; `return_all_beams=True` is not available.")
        return BeamSampler(num_beams=sampler.num_beams, temperature=sampler.temperature)
    if not isinstance(sampler, keras_hub.samplers.Sampler):
        raise ValueError(f"`sampler` must be a name or a keras_hub.samplers.Sampler. Received: {sampler!r}.")
    return sampler


def decode(step, sampler, token_ids, prompt_mask, cache, *, prefill=0, stop_token_ids=None, model=None):
    """Continues prompts until every row has stopped or the length is reached.

    Args:
        step: `(ids [B, T], cache, index) -> (logits [B, T, V], hidden states [B, T, D], cache)`, index being the
            position of the first id.
        sampler: a `keras_hub.samplers.Sampler`.
        token_ids: int [B, L], prompts of any length, padded on the right.
        prompt_mask: bool [B, L], True at prompt tokens.
        cache: nested structure of tensors, the batch first in each.
        prefill: how many positions to run in one call before the loop; what lies beyond a row's prompt is run again.
        stop_token_ids: ids that end a row, or None.
        model: the model whose variables `step` reads.

    Returns:
        `(token_ids, mask)`, both [B, L]: the sequences, and which positions belong to them.
    """
    prompt_mask = ops.cast(prompt_mask, "bool")
    hidden_states = None
    if isinstance(sampler, keras_hub.samplers.ContrastiveSampler):
        prefill = token_ids.shape[1]  # it compares each candidate with every earlier hidden state
    if prefill:
        _, hidden_states, cache = step(token_ids[:, :prefill], cache, 0)

    def next(ids, cache, index):
        last = ops.slice(ids, [0, index - 1], [ops.shape(ids)[0], 1])
        logits, hidden, cache = step(last, cache, index - 1)
        return ops.squeeze(logits, 1), ops.squeeze(hidden, 1), cache

    token_ids = sampler(
        next=next,
        prompt=token_ids,
        cache=cache,
        index=ops.min(ops.sum(ops.cast(prompt_mask, "int32"), axis=1)),
        mask=prompt_mask,
        stop_token_ids=stop_token_ids,
        hidden_states=hidden_states,
        model=model,
    )
    return token_ids, output_mask(token_ids, prompt_mask, stop_token_ids)
