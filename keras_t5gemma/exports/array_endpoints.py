"""What an exported program computes, as functions of arrays in `keras.ops`: generate, score, embed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras_hub
from keras import ops

from keras_t5gemma.config import BOS_ID
from keras_t5gemma.inference.decoding.loop import Control, token_log_probs
from keras_t5gemma.inference.generate import generate_step
from keras_t5gemma.layers.pooling import POOLINGS, pooled


def array_endpoints(lm: Any, max_length: int, stop_token_ids: tuple[int, ...]) -> dict[str, tuple[Callable, str]]:
    """The functions of a language model that are exported.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
        max_length: L, the positions of the decoder.
        stop_token_ids: the ids that end an answer.

    Returns:
        Per name a function of int32 arrays and the lengths of their second axes, a letter each: S for the encoder's
        ids and mask, L for the decoder's. The batch is unknown. The results are dicts of arrays.
    """

    def generate(ids, mask):
        shape = (ops.shape(ids)[0], max_length)
        is_first = ops.broadcast_to(ops.expand_dims(ops.arange(max_length, dtype="int32") == 0, 0), shape)
        inputs = {
            "encoder_token_ids": ids,
            "encoder_padding_mask": mask,
            "decoder_token_ids": ops.where(is_first, BOS_ID, 0),
            "decoder_padding_mask": ops.cast(is_first, "int32"),
            "limits": ops.zeros_like(ids[:, 0]) + max_length,
        }
        sampler = keras_hub.samplers.GreedySampler()
        outputs = generate_step(lm, inputs, control=Control(stop_token_ids), sampler=sampler)
        keep = outputs["decoder_padding_mask"]
        token_ids = ops.where(keep, outputs["decoder_token_ids"], 0)
        return {"decoder_token_ids": token_ids, "decoder_padding_mask": ops.cast(keep, "int32")}

    def score(ids, mask, targets, target_mask):
        decoder_ids = ops.concatenate([ops.full_like(targets[:, :1], BOS_ID), targets[:, :-1]], axis=1)
        decoder_mask = ops.concatenate([ops.ones_like(target_mask[:, :1]), target_mask[:, :-1]], axis=1)
        output = lm.backbone.encoder(ids, mask, training=False)
        hidden = lm.backbone.decoder(decoder_ids, decoder_mask, output, mask, training=False)

        # One position at a time: the logits of all would take L times the memory.
        def body(i, log_probs):
            logits = lm.head(ops.take(hidden, ops.expand_dims(i, 0), axis=1))[:, 0]
            column = token_log_probs(logits, ops.take(targets, ops.expand_dims(i, 0), axis=1))
            return ops.slice_update(log_probs, [0, i], column)

        zeros = ops.cast(ops.zeros_like(targets), "float32")
        log_probs = ops.where(target_mask != 0, ops.fori_loop(0, max_length, body, zeros), 0.0)
        return {"log_likelihood": ops.sum(log_probs, axis=1), "log_probs": log_probs}

    def embed(ids, mask):
        output = lm.backbone.encoder(ids, mask, training=False)
        return {pooling: pooled(output, mask, pooling) for pooling in POOLINGS}

    return {"generate": (generate, "SS"), "score": (score, "SSLL"), "embed": (embed, "SS")}
